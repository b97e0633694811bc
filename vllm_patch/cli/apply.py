# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch apply``: the git patches, put into a vLLM source tree."""

import argparse
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from packaging.version import Version

from vllm_patch.cli import patch_series
from vllm_patch.cli.errors import UsageError
from vllm_patch.cli.patch_series import Series
from vllm_patch.cli.tree_change import (
    check_writable,
    conflicts,
    patched_files,
    write_all,
)
from vllm_patch.cli.vllm_tree import State, VllmTree

RESTORE = (
    "Restore vLLM's own files (git checkout of the release's tag, or install vLLM "
    "again) and remove fp8_tp_padding/ where it is left over"
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "apply",
        help="apply the git patches to a vLLM source tree",
        description="Apply the series of the tree's release. Nothing is written unless "
        "all of it applies; a tree that has it already stays as it is.",
    )
    parser.add_argument(
        "tree",
        type=Path,
        metavar="TREE",
        help="folder that holds vllm/: a git checkout, an unpacked source "
        "distribution, or site-packages",
    )
    parser.add_argument(
        "--reverse", action="store_true", help="take the patches out again"
    )
    careful = parser.add_mutually_exclusive_group()
    careful.add_argument(
        "--check",
        action="store_true",
        help="only say whether the tree is patched: exit code 0 if it is, 1 if not, 2 "
        "if it is neither",
    )
    careful.add_argument(
        "--dry-run", action="store_true", help="do all but write; list the files"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Apply, take out or look for the patches; return the exit code.

    Raises:
        UsageError: No vLLM tree, no series for its release, or a tree that is neither
            vLLM's nor wholly patched. Nothing was written.

    """
    if args.check and args.reverse:
        raise UsageError("--check only looks, so --reverse has no meaning with it")
    tree = VllmTree(args.tree)
    with _locked(args.tree, to_write=not (args.check or args.dry_run)):
        return _run(args, tree)


def _run(args: argparse.Namespace, tree: VllmTree) -> int:
    with _unchanged(args.tree):
        series = series_for(tree)
    what = f"vLLM {series.release} in {args.tree}"
    applied = _is_applied(tree, series)
    if args.check:
        print(f"{what} is {'patched' if applied else 'not patched'}.")
        return 0 if applied else 1
    if applied != args.reverse:
        print(f"{what} is {'patched' if applied else 'not patched'}: nothing to do.")
        return 0
    with _unchanged(args.tree):
        files = patched_files(tree, series, args.reverse)
        check_writable(args.tree, list(files))
    if args.dry_run:
        for path, content in files.items():
            print(f"{'would remove' if content is None else 'would write'} {path}")
        return 0
    with _unchanged(args.tree):
        write_all(args.tree, files)
    done = "Took the patches out of" if args.reverse else "Applied the patches to"
    print(f"{done} {what}: {len(files)} files.")
    return 0


@contextmanager
def _locked(root: Path, to_write: bool) -> Iterator[None]:
    """Keep this machine's other `vllm-patch apply` from a tree, or from writing to it.

    The lock is on the folder, leaves nothing there, and goes with the process.
    """
    kind = fcntl.LOCK_EX if to_write else fcntl.LOCK_SH
    with ExitStack() as opened:
        try:
            folder = os.open(root / "vllm", os.O_RDONLY)
            opened.callback(os.close, folder)
            fcntl.flock(folder, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{root} is in use by another vllm-patch apply. Wait until it has "
                "ended."
            ) from error
        except PermissionError as error:
            raise UsageError(f"{error}. Make the folder readable for you.") from error
        except OSError as error:
            # Some network file systems have no locks.
            raise UsageError(
                f"{root} cannot be locked: {error}. Apply the patches to a copy of the "
                "tree, on another file system."
            ) from error
        yield


@contextmanager
def _unchanged(root: Path) -> Iterator[None]:
    """Turn a full disk and the like into a message."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error}. {root} is as it was before.") from error


def series_for(tree: VllmTree) -> Series:
    """Return the series of the tree's release.

    Raises:
        UsageError: There is none, or the tree's files are another release's.

    """
    known = patch_series.read_all()
    states = [(series, tree.state(series)) for series in known.values()]
    applied = [series for series, state in states if state is State.APPLIED]
    whole = State.PRISTINE, State.APPLIED
    fitting = [series for series, state in states if state in whole]
    release = tree.release()
    if release is None:
        if fitting:
            return fitting[0]
        raise UsageError(
            f"{tree.root} does not say which release of vLLM it is, and fits none of "
            f"{', '.join(known)}. Check one of these out."
        )
    if release not in known:
        # git am and a build make 0.33.0 a 0.33.1.dev4.
        if applied:
            return applied[0]
        raise UsageError(_no_series(tree, release, known))
    series = known[release]
    if fitting and series not in fitting:
        raise UsageError(
            f"{tree.root} says that it is vLLM {release}, but its files are those of "
            f"{fitting[0].release}. If the files are right, {tree.release_file} is "
            "stale: remove it."
        )
    return series


def _no_series(tree: VllmTree, release: str, known: dict[str, Series]) -> str:
    nearest = min(known.values(), key=lambda s: _distance(s.release, release))
    places = conflicts(tree, nearest)
    fate = f"conflicts in {', '.join(places)}" if places else "has no conflicts"
    return (
        f"{tree.root} is vLLM {release}, and there are patches for "
        f"{', '.join(known)}. The nearest, for {nearest.release}, {fate}. Check a "
        "supported release out, or apply it by hand: git am --keep-non-patch "
        f"{nearest.patches[0].parent}/*.patch"
    )


def _distance(release: str, other: str) -> int:
    numbers = [
        (v.major * 1000 + v.minor) * 1000 + v.micro
        for v in (Version(release), Version(other))
    ]
    return abs(numbers[0] - numbers[1])


def _is_applied(tree: VllmTree, series: Series) -> bool:
    state = tree.state(series)
    if state is State.EDITED:
        raise UsageError(
            f"{tree.root} has local edits in {', '.join(tree.edited(series))}: neither "
            f"as in vLLM {series.release} nor as these patches leave them. {RESTORE}."
        )
    if state is State.MIXED:
        there = tree.patched(series)
        missing = [path for path in series.contents if path not in there]
        part = f"all but {', '.join(missing)}"
        if len(there) < len(missing):
            part = f"only {', '.join(there)}"
        raise UsageError(f"{tree.root} has a part of the patches, {part}. {RESTORE}.")
    return state is State.APPLIED
