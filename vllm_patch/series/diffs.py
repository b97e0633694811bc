# SPDX-License-Identifier: Apache-2.0
"""What a commit changes in a release of vLLM, as git's diffs.

Neither the release's tree nor git is needed: new files are ours, and a hook's place is
found by the lines around it.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from packaging.version import Version

from vllm_patch.series.commits import COMMITS, CONFIGS, LIBRARY, TESTS, Commit

PACKAGE = Path(__file__).parents[1]
HOOKS = Path(__file__).parent / "hooks"
_INSTALLED = Path(__file__).parent / "tests"
OUR_TESTS = (
    _INSTALLED if _INSTALLED.is_dir() else PACKAGE.parent / "tests" / "fp8_tp_padding"
)

# Path in a tree -> content, None where there is no such file.
Files = dict[str, bytes | None]
# What stands before the lines of a hunk.
HUNK = r"^(?:(?:diff --git|---|\+\+\+) .*\n)*@@ .*\n"

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


def new_contents() -> dict[str, bytes]:
    """Return path -> content of all files that commits bring."""
    files = (new_files(commit) for commit in COMMITS)
    return {p: file.read_bytes() for each in files for p, file in sorted(each.items())}


def contents(root: Path, paths: Iterable[str]) -> Files:
    """Return what files of a tree hold."""
    files = {path: root / path for path in paths}
    return {p: f.read_bytes() if f.is_file() else None for p, f in files.items()}


def hooked(files: Files, release: str, reverse: bool = False) -> Files | None:
    """Return files with all hooks put in, or taken out; None if one does not fit.

    A hook fits where a file has the lines that it names, and has them once.
    """
    files = dict(files)
    gone, added = "+-" if reverse else "-+"
    for commit in reversed(COMMITS) if reverse else COMMITS:
        for path, diff in hooks_of(commit, release).items():
            for hunk in re.split(HUNK, diff, flags=re.M)[1:] if path in files else ():
                lines = hunk.splitlines(keepends=True)
                old, new = (
                    "".join(x[1:] for x in lines if x[0] in (" ", sign)).encode()
                    for sign in (gone, added)
                )
                if (files[path] or b"").count(old) != 1:
                    return None
                files[path] = files[path].replace(old, new)
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


def blob_hash(content: bytes | None) -> str | None:
    """Return the hash by which git names a file's content."""
    if content is None:
        return None
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
