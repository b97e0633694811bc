# SPDX-License-Identifier: Apache-2.0
"""What a commit changes in a release of vLLM, as git's diffs.

Neither the release's tree nor git is needed: new files are ours, and git finds the
place of a hook by the lines around it.
"""

import hashlib
import json
import re
from pathlib import Path

from packaging.version import Version

from vllm_patch.series.commits import COMMITS, CONFIGS, LIBRARY, TESTS, Commit

PACKAGE = Path(__file__).parents[1]
HOOKS = Path(__file__).parent / "hooks"
_INSTALLED = Path(__file__).parent / "tests"
OUR_TESTS = (
    _INSTALLED if _INSTALLED.is_dir() else PACKAGE.parent / "tests" / "fp8_tp_padding"
)

# Release -> path -> git's blob hash of each file of vLLM's own that hooks change.
STOCK: dict[str, dict[str, str]] = json.loads((HOOKS / "stock.json").read_text())


def new_files(commit: Commit) -> dict[str, Path]:
    """Return path in a vLLM tree -> our file, of those that come with a commit."""
    files = {}
    for folder, names, target in (
        (PACKAGE / "fp8_tp_padding", commit.sources, LIBRARY),
        (OUR_TESTS, commit.tests, TESTS),
    ):
        for path in (path for name in names for path in folder.glob(name)):
            place = f"{target}/{path.relative_to(folder).as_posix()}"
            if path.suffix == ".json":
                place = f"{CONFIGS}/{path.name}"
            files[place] = path
    return files


def hooks_of(commit: Commit, release: str) -> dict[str, str]:
    """Return path -> diff of the files of vLLM's own that a commit changes."""
    hooks: dict[str, str] = {}
    for file in sorted(HOOKS.glob(f"*/{commit.name}.diff")):
        first, last = file.parent.name.split("-")
        if Version(first) <= Version(release) <= Version(last):
            for diff in re.split(r"^(?=diff --git )", file.read_text(), flags=re.M)[1:]:
                path = re.match(r"diff --git a/(.+) b/", diff)[1]
                hooks[path] = hooks.get(path, "") + diff
    return hooks


def changes_of(commit: Commit, release: str) -> dict[str, str]:
    """Return path -> diff of all files that a commit changes or brings."""
    new = {
        path: new_file(path, file.read_text(encoding="utf-8"))
        for path, file in new_files(commit).items()
    }
    return dict(sorted((hooks_of(commit, release) | new).items()))


def changes(release: str) -> dict[str, str]:
    """Return path -> diffs, of all commits in order."""
    files: dict[str, str] = {}
    for commit in COMMITS:
        for path, diff in changes_of(commit, release).items():
            files[path] = files.get(path, "") + diff
    return files


def new_file(path: str, content: str) -> str:
    """Return the diff that creates a file, as git writes it."""
    head = f"diff --git a/{path} b/{path}\nnew file mode 100644\n"
    head += f"index {'0' * 40}..{blob_hash(content.encode())}\n"
    if not content:
        return head
    lines = content.removesuffix("\n").split("\n")
    count = f",{len(lines)}" if len(lines) > 1 else ""
    body = "".join(f"+{line}\n" for line in lines)
    if not content.endswith("\n"):
        body += "\\ No newline at end of file\n"
    return f"{head}--- /dev/null\n+++ b/{path}\n@@ -0,0 +1{count} @@\n{body}"


def blob_hash(content: bytes) -> str:
    """Return the hash by which git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
