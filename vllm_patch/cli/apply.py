# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch apply``: the same change as the series, in a vLLM source tree."""

import argparse
import fcntl
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from packaging.version import InvalidVersion, Version

from vllm_patch.cli.errors import UsageError
from vllm_patch.cli.tree_write import Files, contents, write_all
from vllm_patch.series.diffs import STOCK, blob_hash, changes


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
        raise UsageError(f"{error}. {root} was not changed.") from error


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
        write_all(root, others)
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
    top = "" if (root / "setup.py").is_file() else "vllm/"
    stated = _stated(root)
    if stated and not stated.is_devrelease and stated.public not in STOCK:
        raise UsageError(f"{root} is vLLM {stated}; known are {', '.join(STOCK)}.")
    for release in reversed(STOCK):
        diffs = {p: d for p, d in changes(release).items() if p.startswith(top)}
        found = contents(root, diffs)
        foreign[release] = _foreign(found, release)
        if not foreign[release]:
            return release, False, _git_apply(found, diffs)
        if stock := _git_apply(found, diffs, "--reverse"):
            foreign[release] = _foreign(stock, release)
            if not foreign[release]:
                return release, True, stock
    nearest = stated.public if stated else None
    if nearest not in foreign:
        nearest = min(foreign, key=lambda release: len(foreign[release]))
    wrong = foreign[nearest]
    raise UsageError(
        f"{root} has local edits, a part of the change, or another release than "
        f"{', '.join(STOCK)}. Nearest is {nearest}, but not in "
        f"{', '.join(wrong[:5])}{' and more' * (len(wrong) > 5)}. Restore vLLM's own "
        "files, and remove fp8_tp_padding/ where it is left over."
    )


def _stated(root: Path) -> Version | None:
    """Return the version that a tree states; a checkout states none."""
    for name, pattern in (
        ("vllm/_version.py", r"^__version__ = (?:version = )?['\"](.+)['\"]"),
        ("PKG-INFO", r"^Version: (.+)"),
    ):
        text = (root / name).read_text() if (root / name).is_file() else ""
        if found := re.search(pattern, text, re.MULTILINE):
            with suppress(InvalidVersion):
                return Version(found[1].strip())
    return None


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
        for path, content in files.items():
            if content is not None:
                (Path(scratch) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(scratch) / path).write_bytes(content)
        # Inside a repository git apply would say yes and change nothing.
        environment["GIT_CEILING_DIRECTORIES"] = str(Path(scratch).resolve().parent)
        command = ["git", "apply", "--whitespace=nowarn", *options]
        done = subprocess.run(
            command, cwd=scratch, env=environment, input=patch, capture_output=True
        )
        return contents(Path(scratch), files) if done.returncode == 0 else None


def _check_writable(file: Path) -> None:
    folder = next(parent for parent in file.parents if parent.is_dir())
    for place in (folder, *([file] if file.exists() else [])):
        # Root may write everywhere, and should not where its owner does not.
        if not os.access(place, os.W_OK) or not place.stat().st_mode & stat.S_IWUSR:
            raise UsageError(f"{place} is read-only: make it writable, or copy TREE.")
