# SPDX-License-Identifier: Apache-2.0
"""Changes files of a tree: worked out beside it first, then all or none."""

import os
import re
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from vllm_patch.cli.errors import UsageError
from vllm_patch.cli.patch_series import Series, blob_hash, content_of
from vllm_patch.cli.vllm_tree import VllmTree

SUFFIX = ".vllm-patch"


def patched_files(
    tree: VllmTree, series: Series, reverse: bool = False
) -> dict[str, bytes | None]:
    """Apply a series to copies of a tree's files.

    Returns:
        Path -> new content, None for a file that goes.

    Raises:
        UsageError: git is missing, or its result is not what the series says.

    """
    paths = tree.paths(series)
    with tempfile.TemporaryDirectory() as scratch:
        copy = _copy_of(tree, paths, Path(scratch))
        for patch in reversed(series.patches) if reverse else series.patches:
            if failure := _git_apply(copy, patch, paths, reverse):
                raise UsageError(f"{patch} does not apply: {failure}")
        changed = {path: content_of(copy / path) for path in paths}
    # git apply can succeed without doing anything.
    expected = 0 if reverse else -1
    for path, content in changed.items():
        if blob_hash(content) != series.contents[path][expected]:
            raise UsageError(f"git apply left {path} as it should not be; nothing done")
    return changed


def conflicts(tree: VllmTree, series: Series) -> list[str]:
    """Return ``path`` or ``path:line`` of what does not take a series."""
    paths = tree.paths(series)
    found: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = _copy_of(tree, paths, Path(scratch))
        for patch in series.patches:
            failure = _git_apply(copy, patch, paths)
            found += re.findall(r"patch failed: (\S+)", failure) or re.findall(
                r"error: ([^:\n]+)", failure
            )
    return list(dict.fromkeys(found))


def _copy_of(tree: VllmTree, paths: list[str], scratch: Path) -> Path:
    for path in paths:
        content = content_of(tree.root / path)
        if content is not None:
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            (scratch / path).write_bytes(content)
    return scratch


def _git_apply(root: Path, patch: Path, paths: list[str], reverse=False) -> str:
    """Apply one patch; return git's complaint, empty if it worked."""
    git = shutil.which("git")
    if git is None:
        raise UsageError("git is not installed, and applies the patches. Install it.")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        # Inside another repository git apply would succeed and do nothing.
        "GIT_CEILING_DIRECTORIES": str(root.resolve().parent),
        "LC_ALL": "C",
    }
    only = [] if any(not p.startswith("vllm/") for p in paths) else ["--include=vllm/*"]
    done = subprocess.run(
        [git, "apply", *only, *(["--reverse"] if reverse else []), patch.resolve()],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stderr.strip() if done.returncode else ""


def check_writable(root: Path, paths: list[str]) -> None:
    """Raise UsageError if a file or the folder it goes to is read-only."""
    for path in paths:
        file = root / path
        folder = next(parent for parent in file.parents if parent.is_dir())
        for place in (folder, *([file] if file.exists() else [])):
            mode = place.stat().st_mode
            # Root may write everywhere, and should not where its owner does not.
            if not os.access(place, os.W_OK) or not mode & stat.S_IWUSR:
                raise UsageError(
                    f"{place} is read-only, and the patches change {path}. Make it "
                    "writable, or apply the patches to a copy of the tree."
                )


def write_all(root: Path, files: dict[str, bytes | None]) -> None:
    """Write, or remove, all files; after any failure the tree is as it was.

    Each file gets its new content by a rename, so that hard links to the old one
    (package caches) keep theirs.
    """
    before = {path: content_of(root / path) for path in files}
    written = [root / path for path, content in files.items() if content is not None]
    created = _missing_folders(written)
    try:
        for folder in created:
            folder.mkdir()
        for path, content in files.items():
            if content is not None:
                _stage(root / path, content)
        for path, content in files.items():
            _put(root / path, content)
    except BaseException:
        _restore(root, before, created)
        raise
    for path, content in files.items():
        if content is None:
            _remove_traces(root / path, root)


def _missing_folders(files: list[Path]) -> list[Path]:
    """Return the folders that files lack, parents first."""
    missing = {p for file in files for p in file.parents if not p.exists()}
    return sorted(missing)


def _stage(file: Path, content: bytes) -> None:
    staged = file.with_name(file.name + SUFFIX)
    staged.write_bytes(content)
    if file.exists():
        shutil.copymode(file, staged)


def _put(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink()
    else:
        os.replace(file.with_name(file.name + SUFFIX), file.resolve())


def _restore(root: Path, before: dict[str, bytes | None], created: list[Path]) -> None:
    for path, content in before.items():
        file = root / path
        file.with_name(file.name + SUFFIX).unlink(missing_ok=True)
        if content_of(file) == content:
            continue
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
    for folder in reversed(created):
        with suppress(FileNotFoundError):
            folder.rmdir()


def _remove_traces(file: Path, root: Path) -> None:
    """Remove what Python compiled from a file that went, and folders left empty."""
    cache = file.parent / "__pycache__"
    for compiled in cache.glob(f"{file.stem}.*.pyc"):
        compiled.unlink()
    with suppress(OSError):
        cache.rmdir()
    # Ends at the first folder that is not empty.
    with suppress(OSError):
        for folder in file.relative_to(root).parents[:-1]:
            (root / folder).rmdir()
