# SPDX-License-Identifier: Apache-2.0
"""Writes files of a tree: all of them, or after any failure none."""

import os
import shutil
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from vllm_patch.cli.errors import UsageError

# Path in the tree -> content, None where there is no such file.
Files = dict[str, bytes | None]
NEW, OLD = ".vllm-patch-new", ".vllm-patch-old"


def contents(root: Path, paths: Iterable[str]) -> Files:
    """Return what files of a tree hold."""
    files = {path: root / path for path in paths}
    return {p: f.read_bytes() if f.is_file() else None for p, f in files.items()}


def write_all(root: Path, files: Files) -> None:
    """Write, or remove, all files.

    New content is written beside the old one first, which gets a second name. Then new
    files take their place, ones that change (vLLM's own, which need the new ones), and
    ones that go; so that putting all back takes renames only.

    Raises:
        UsageError: A file could not be written. The tree is as it was, or the message
            names what is not.

    """
    before = contents(root, files)
    changed = [path for path in files if files[path] != before[path]]
    changed.sort(key=lambda path: (files[path] is None) - (before[path] is None))
    places = {path: (root / path).resolve() for path in changed}
    _check_no_leftovers([*places.values()])
    folders = _missing_folders([root / p for p in changed if files[p] is not None])
    try:
        for folder in folders:
            folder.mkdir()
        for path, place in places.items():
            _stage(place, files[path])
        for path, place in places.items():
            _swap(place, files[path] is None)
    except BaseException as error:
        # A second signal must not stop this.
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        handlers = {n: signal.signal(n, signal.SIG_IGN) for n in numbers}
        _put_back(before, places, folders)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        after = contents(root, files)
        if wrong := [path for path in files if after[path] != before[path]]:
            raise UsageError(
                f"{error!r}. These could not be put back: {', '.join(wrong)}; what "
                f"they held is in files that end in {OLD}."
            ) from error
        if isinstance(error, OSError):
            raise UsageError(f"{error}. {root} is as it was before.") from error
        raise
    for path, place in places.items():
        _beside(place, OLD).unlink(missing_ok=True)
        if files[path] is None:
            _remove_traces(root, path)


def _check_no_leftovers(files: list[Path]) -> None:
    """Raise UsageError if a run that was killed left one of its files behind."""
    names = (_beside(file, suffix) for file in files for suffix in (NEW, OLD))
    if left := [str(name) for name in names if name.exists()]:
        raise UsageError(
            f"{', '.join(left)} was left by a run that was killed. Look whether vLLM's "
            "own files are what you want, restore them if not, and remove it."
        )


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def _missing_folders(files: list[Path]) -> list[Path]:
    """Return the folders that files lack, parents first."""
    return sorted({p for file in files for p in file.parents if not p.exists()})


def _stage(file: Path, content: bytes | None) -> None:
    if file.exists():
        _keep(file, _beside(file, OLD))
    if content is not None:
        staged = _beside(file, NEW)
        staged.write_bytes(content)
        if file.exists():
            shutil.copymode(file, staged)


def _keep(file: Path, name: Path) -> None:
    """Give a file a second name."""
    try:
        os.link(file, name)
    except OSError:
        # Not every file system has hard links.
        shutil.copy2(file, name)


def _swap(file: Path, goes: bool) -> None:
    if goes:
        file.unlink()
    else:
        os.replace(_beside(file, NEW), file)


def _put_back(before: Files, places: dict[str, Path], folders: list[Path]) -> None:
    """Undo as much as can be undone."""
    for path, file in places.items():
        with suppress(OSError):
            _beside(file, NEW).unlink()
        with suppress(OSError):
            if before[path] is None:
                file.unlink()
            elif _beside(file, OLD).exists():
                os.replace(_beside(file, OLD), file)
                # Two names of one file are left as they are.
                _beside(file, OLD).unlink(missing_ok=True)
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


def _remove_traces(root: Path, path: str) -> None:
    """Remove what Python compiled from a file that went, and folders left empty."""
    cache = (root / path).parent / "__pycache__"
    for compiled in cache.glob(f"{Path(path).stem}.*.pyc"):
        compiled.unlink(missing_ok=True)
    for folder in (cache, *(root / parent for parent in Path(path).parents[:-1])):
        with suppress(OSError):  # It holds something, or is not there.
            folder.rmdir()
