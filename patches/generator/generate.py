# SPDX-License-Identifier: Apache-2.0
"""Makes the series of one vLLM release, with bytes that do not move."""

import ast
import os
import re
import shutil
import subprocess
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from packaging.version import Version

from patches.generator.commits import (
    AUTHOR,
    COMMITS,
    EMAIL,
    FOLDERS,
    KEPT_HERE,
    LIBRARY,
    Commit,
)

REPOSITORY = Path(__file__).parents[2]
HOOKS = Path(__file__).parent / "hooks"
FORMAT_PATCH = (
    "format-patch",
    "--quiet",
    "--zero-commit",
    "--full-index",
    "--no-signature",
    "--no-stat",
    "--no-numbered",
    "--no-renames",
    "--diff-algorithm=myers",
    "--unified=3",
)


class GenerateError(Exception):
    """The package, the table of commits and the hooks do not fit together."""


def write_series(release: str, tree: Path, target: Path) -> list[str]:
    """Write a release's ``series`` and its patches to the folder ``target``.

    Args:
        release: The vLLM release.
        tree: Its source tree, which is only read.
        target: Folder to write; what it held is removed.

    Returns:
        The names of the patches, in order.

    Raises:
        GenerateError: A file is in no commit or in two, imports one of a later
            commit, would not be installed by vLLM's ``setup.py``, or a hook does
            not fit the release.

    """
    assigned = assign_files()
    check_imports(assigned)
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch)
        for path in sorted({p for c in COMMITS for p in _hooked_files(c, release)}):
            _copy(tree / path, repository / path)
            # Some of vLLM's files are executable, and a patch names the mode.
            shutil.copymode(tree / path, repository / path)
        git(repository, "init", "--quiet")
        _commit(repository, f"vLLM {release}")
        for commit in COMMITS:
            _apply_hooks(repository, commit, release)
            for source in assigned[commit.name]:
                _copy(REPOSITORY / source, repository / in_tree(source))
            _commit(repository, f"{commit.message}\n{_sign_off()}")
        _check_packaged(tree, repository)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        base = git(repository, "rev-list", "--max-parents=0", "HEAD").strip()
        git(repository, *FORMAT_PATCH, "--output-directory", target.resolve(), base)
    names = sorted(path.name for path in target.glob("*.patch"))
    (target / "series").write_text("".join(f"{name}\n" for name in names))
    return names


def assign_files() -> dict[str, list[str]]:
    """Return the files of each commit, from the folders that go upstream.

    Raises:
        GenerateError: A file belongs to no commit or to two, or a row of the table
            names no file.

    """
    files = [
        file
        for folder in FOLDERS
        for path in sorted((REPOSITORY / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
        if (file := path.relative_to(REPOSITORY).as_posix()) not in KEPT_HERE
    ]
    assigned: dict[str, list[str]] = {commit.name: [] for commit in COMMITS}
    for file in files:
        owners = [c.name for c in COMMITS if any(fnmatch(file, s) for s in c.sources)]
        if len(owners) != 1:
            raise GenerateError(
                f"{file} is in {len(owners)} commits {owners}, and each file needs "
                "one. Name it in patches/generator/commits.py, in one row of COMMITS "
                "or in KEPT_HERE."
            )
        assigned[owners[0]].append(file)
    for commit in COMMITS:
        for source in commit.sources:
            if not any(fnmatch(file, source) for file in files):
                raise GenerateError(
                    f"commit {commit.name!r} names {source}, which is no file. Mend "
                    "the row in patches/generator/commits.py."
                )
    return assigned


def check_imports(assigned: dict[str, list[str]]) -> None:
    """Raise GenerateError if a file needs one that comes later, or is not upstream."""
    known: set[str] = set()
    for name, files in assigned.items():
        known.update(files)
        for file in files:
            if not file.endswith(".py"):
                continue
            for needed in _needs(file):
                if needed not in known:
                    raise GenerateError(
                        f"{file} of commit {name!r} imports {needed}, which is not "
                        "there yet. Give it to that commit or an earlier one in "
                        "patches/generator/commits.py."
                    )


def _needs(file: str) -> list[str]:
    """List the files of our folders that ``file`` imports, by whichever name."""
    needed: list[str] = []
    for node in ast.walk(ast.parse((REPOSITORY / file).read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = _absolute(file, node)
            modules = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            needed += _file_of(file, module)
    return needed


def _absolute(file: str, node: ast.ImportFrom) -> str:
    """Return what ``from X`` in ``file`` names in a vLLM tree."""
    if not node.level:
        return node.module
    package = in_tree(file).split("/")[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def _file_of(file: str, module: str) -> list[str]:
    """Return the file of our folders behind a dotted name that ``file`` imports."""
    for here, there in FOLDERS.items():
        if not f"{module}.".startswith(there.replace("/", ".") + "."):
            continue
        path = here + module.replace(".", "/").removeprefix(there)
        # The last part may be a module, a package, or what one of them defines.
        stems = path, path.rpartition("/")[0]
        names = [f"{stem}{end}" for stem in stems for end in (".py", "/__init__.py")]
        return [name for name in names if (REPOSITORY / name).is_file()][:1]
    if module.split(".")[0] in ("vllm_patch", "tests"):
        raise GenerateError(
            f"{file} imports {module}, which no vLLM tree has. Import it relatively or "
            "as in the tree, or add the file to KEPT_HERE in "
            "patches/generator/commits.py."
        )
    return []


def in_tree(source: str) -> str:
    """Return where a file of ``FOLDERS`` lies in a vLLM tree."""
    for here, there in FOLDERS.items():
        if source.startswith(f"{here}/"):
            return there + source.removeprefix(here)
    raise ValueError(f"{source} is in none of {list(FOLDERS)}")


def hooks_of(commit: Commit, release: str) -> list[Path]:
    """Return a commit's hooks for a release; a hook's folder names its releases."""
    hooks = []
    for hook in sorted(HOOKS.glob(f"*/{commit.name}.diff")):
        first, _, last = hook.parent.name.partition("-")
        if Version(first) <= Version(release) <= Version(last):
            hooks.append(hook)
    return hooks


def _hooked_files(commit: Commit, release: str) -> list[str]:
    text = "".join(hook.read_text() for hook in hooks_of(commit, release))
    return re.findall(r"^--- a/(.+)$", text, re.MULTILINE)


def _apply_hooks(repository: Path, commit: Commit, release: str) -> None:
    for hook in hooks_of(commit, release):
        try:
            git(repository, "apply", "--whitespace=nowarn", hook.resolve())
        except subprocess.CalledProcessError as error:
            raise GenerateError(
                f"{hook.relative_to(HOOKS)} does not fit vLLM {release}: "
                f"{error.stderr.strip()}. Narrow the releases in its folder's name and "
                "write another hook for the rest."
            ) from error


def _check_packaged(tree: Path, patched: Path) -> None:
    """Raise GenerateError if a wheel of vLLM would leave a data file behind."""
    setup = patched / "setup.py"
    text = (setup if setup.is_file() else tree / "setup.py").read_text()
    assignments = (n for n in ast.parse(text).body if isinstance(n, ast.Assign))
    (package_data,) = (
        ast.literal_eval(node.value)
        for node in assignments
        if ast.unparse(node.targets[0]) == "package_data"
    )
    for path in sorted((patched / LIBRARY).rglob("*")):
        name = path.relative_to(patched / "vllm").as_posix()
        patterns = package_data["vllm"]
        if path.is_dir() or name.endswith(".py"):
            continue
        if not any(fnmatch(name, pattern) for pattern in patterns):
            raise GenerateError(
                f"vllm/{name} matches no pattern of package_data in vLLM's setup.py, "
                "so wheels would not have it. Add the pattern in a hook of its commit."
            )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _sign_off() -> str:
    return f"Signed-off-by: {AUTHOR} <{EMAIL}>\n"


def _commit(repository: Path, message: str) -> None:
    git(repository, "add", "--all", "--force")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", message)


def git(repository: Path, *arguments: str | Path) -> str:
    """Run git in ``repository``, whatever the user has configured; return stdout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        # A tree inside another repository must not be taken for a part of it.
        "GIT_CEILING_DIRECTORIES": str(repository.resolve().parent),
    }
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {
            f"GIT_{role}_NAME": AUTHOR,
            f"GIT_{role}_EMAIL": EMAIL,
            f"GIT_{role}_DATE": "2000-01-01T00:00:00+0000",
        }
    return subprocess.run(
        ["git", *map(str, arguments)],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
