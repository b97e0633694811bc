# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch apply``: the same change as the series, in a vLLM source tree."""

import argparse
import fcntl
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_patch.cli.errors import UsageError
from vllm_patch.series.diffs import STOCK, blob_hash, changes

# Path in the tree -> content, None where there is no such file.
Files = dict[str, bytes | None]


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "apply",
        help="put the change into a vLLM source tree",
        description="Change a tree as its release's series does: all of it or nothing.",
    )
    tree = "folder that holds vllm/: a checkout, an unpacked sdist, or site-packages"
    parser.add_argument("tree", type=Path, metavar="TREE", help=tree)
    careful = parser.add_mutually_exclusive_group()
    codes = "exit code 0 if the tree is patched, 1 if not, 2 if it is neither"
    careful.add_argument("--check", action="store_true", help=f"only look: {codes}")
    careful.add_argument("--dry-run", action="store_true", help="only list the files")
    parser.add_argument("--reverse", action="store_true", help="take it out again")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Apply, take out or look for the change; return the exit code.

    Raises:
        UsageError: No vLLM tree, or one whose files are neither those of a known
            release nor wholly patched. Nothing was written.

    """
    root = args.tree
    if not (root / "vllm" / "envs.py").is_file():
        raise UsageError(f"{root} is no vLLM tree. Give the folder that holds vllm/.")
    if shutil.which("git") is None:
        raise UsageError("git is not installed, and applies the diffs. Install it.")
    try:
        with _locked(root / "vllm", to_write=not (args.check or args.dry_run)):
            return _run(args, root)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"{error}. {root} is as it was before.") from error


def _run(args: argparse.Namespace, root: Path) -> int:
    release, is_patched, others = _turned(root)
    what = f"vLLM {release} in {root}"
    if args.check or is_patched != args.reverse:
        said = "." if args.check else ": nothing to do."
        print(f"{what} is {'patched' if is_patched else 'not patched'}{said}")
        return 1 if args.check and not is_patched else 0
    for path in others:
        _check_writable(root / path)
        if args.dry_run:
            print(f"would {'remove' if others[path] is None else 'write'} {path}")
    if not args.dry_run:
        _write(root, others)
        done = "Took the change out of" if args.reverse else "Patched"
        print(f"{done} {what}: {len(others)} files.")
    return 0


@contextmanager
def _locked(folder: Path, to_write: bool) -> Iterator[None]:
    """Keep this machine's other `vllm-patch apply` from a tree, or from writing to it.

    The lock is on the folder, leaves nothing there, and goes with the process.
    """
    kind = fcntl.LOCK_EX if to_write else fcntl.LOCK_SH
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, kind | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UsageError(f"{folder} is in use by another vllm-patch apply.") from error
    finally:
        os.close(opened)


def _turned(root: Path) -> tuple[str, bool, Files]:
    """Return a tree's release, whether it is patched, and its files the other way.

    Raises:
        UsageError: Its files are no known release's, wholly patched or not at all.

    """
    foreign = {}
    # site-packages have no place for tests.
    top = "" if (root / "pyproject.toml").is_file() else "vllm/"
    for release in reversed(STOCK):
        diffs = {p: d for p, d in changes(release).items() if p.startswith(top)}
        found = _contents(root, diffs)
        foreign[release] = _foreign(found, release)
        if not foreign[release]:
            return release, False, _git_apply(found, diffs)
        if stock := _git_apply(found, diffs, "--reverse"):
            foreign[release] = _foreign(stock, release)
            if not foreign[release]:
                return release, True, stock
    nearest, wrong = min(foreign.items(), key=lambda item: len(item[1]))
    raise UsageError(
        f"{root} has local edits, a part of the change, or another release than "
        f"{', '.join(STOCK)}. Nearest is {nearest}, but not in "
        f"{', '.join(wrong[:5])}{' and more' * (len(wrong) > 5)}. Restore vLLM's own "
        "files, and remove fp8_tp_padding/ where it is left over."
    )


def _foreign(files: Files, release: str) -> list[str]:
    """Return the files that the release does not have, or not so."""
    blobs = {path: blob_hash(held) if held else held for path, held in files.items()}
    return [path for path in files if blobs[path] != STOCK[release].get(path)]


def _git_apply(files: Files, diffs: dict[str, str], *options: str) -> Files | None:
    """Return what git makes of files, or None if the diffs do not fit."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    patch = "".join(diffs.values()).encode()
    with tempfile.TemporaryDirectory() as scratch:
        _put_all(Path(scratch), files)
        # Inside a repository git apply would say yes and change nothing.
        environment["GIT_CEILING_DIRECTORIES"] = str(Path(scratch).resolve().parent)
        command = ["git", "apply", "--whitespace=nowarn", *options]
        done = subprocess.run(
            command, cwd=scratch, env=environment, input=patch, capture_output=True
        )
        return _contents(Path(scratch), files) if done.returncode == 0 else None


def _contents(root: Path, paths: Iterable[str]) -> Files:
    files = {path: root / path for path in paths}
    return {p: f.read_bytes() if f.is_file() else None for p, f in files.items()}


def _check_writable(file: Path) -> None:
    folder = next(parent for parent in file.parents if parent.is_dir())
    for place in (folder, *([file] if file.exists() else [])):
        # Root may write everywhere, and should not where its owner does not.
        if not os.access(place, os.W_OK) or not place.stat().st_mode & stat.S_IWUSR:
            raise UsageError(f"{place} is read-only: make it writable, or copy TREE.")


def _write(root: Path, files: Files) -> None:
    """Write, or remove, all files; after any failure the tree is as it was."""
    before = _contents(root, files)
    try:
        _put_all(root, files)
    except BaseException:
        _put_all(root, before)
        raise


def _put_all(root: Path, files: Files) -> None:
    # What goes makes room for what comes.
    for path, content in sorted(files.items(), key=lambda file: file[1] is not None):
        if content is None:
            _remove(root, path)
        elif content != _contents(root, [path])[path]:
            _replace(root / path, content)


def _replace(file: Path, content: bytes) -> None:
    """Write by a rename, so that hard links to a package cache keep their content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f"{file.name}.vllm-patch")
    try:
        staged.write_bytes(content)
        if file.exists():
            shutil.copymode(file, staged)
        os.replace(staged, file.resolve())
    finally:
        staged.unlink(missing_ok=True)


def _remove(root: Path, path: str) -> None:
    """Remove a file, what Python compiled from it, and folders left empty."""
    file, cache = root / path, (root / path).parent / "__pycache__"
    for gone in (file, *cache.glob(f"{file.stem}.*.pyc")):
        gone.unlink(missing_ok=True)
    for folder in (cache, *(root / parent for parent in Path(path).parents[:-1])):
        with suppress(OSError):  # It holds something, or is not there.
            folder.rmdir()
