# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch apply``: the same change as the series, in a vLLM source tree."""

import argparse
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_patch import releases
from vllm_patch.cli import UsageError, remove, signals_held
from vllm_patch.series import diffs
from vllm_patch.series.diffs import STOCK, Files, contents, hooked

# Of what is written beside a file.
NEW, OLD = ".vllm-patch-new", ".vllm-patch-old"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "apply",
        help="put the change into a vLLM source tree",
        description="Change a tree as its release's series does: all of it or nothing.",
        epilog="example: vllm-patch apply path/to/tree --check",
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
    with _locked(root / "vllm", to_write=not (args.check or args.dry_run)):
        release, is_patched, turned = _turned(root)
        what = f"vLLM {release} in {root}"
        if args.check or is_patched != args.reverse:
            said = "." if args.check else ": nothing to do."
            print(f"{what} is {'patched' if is_patched else 'not patched'}{said}")
            return 1 if args.check and not is_patched else 0
        for path in turned:
            _check_writable(root / path)
            if args.dry_run:
                print(f"would {'remove' if turned[path] is None else 'write'} {path}")
        if not args.dry_run:
            _write_all(root, turned)
            done = "Took the change out of" if args.reverse else "Patched"
            print(f"{done} {what}: {len(turned)} files.")
    return 0


@contextmanager
def _locked(folder: Path, to_write: bool) -> Iterator[None]:
    """Keep this machine's other ``vllm-patch apply`` away; leaves nothing behind."""
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
    """Return a tree's release, whether it is patched, and its files the other way."""
    known, stated = ", ".join(STOCK), releases.stated(root)
    if stated not in (None, *STOCK):
        raise UsageError(f"{root} is vLLM {stated}; known are {known}.")
    # site-packages have no place for tests.
    top = "" if (root / "setup.py").is_file() else "vllm/"
    ours = {p: held for p, held in diffs.new_contents().items() if p.startswith(top)}
    found, foreign = contents(root, ours), {}
    for release, blobs in reversed(STOCK.items()):
        own = contents(root, (path for path in blobs if path.startswith(top)))
        stock = hooked(own, release, reverse=True)
        is_patched = stock is not None
        stock, new = (stock, ours) if is_patched else (own, dict.fromkeys(ours))
        wrong = [path for path in ours if found[path] != new[path]]
        wrong += [path for path in own if diffs.blob_hash(stock[path]) != blobs[path]]
        if not wrong and is_patched:
            return release, True, stock | dict.fromkeys(ours)
        if not wrong:
            return release, False, hooked(stock, release) | ours
        foreign[release] = wrong
    nearest = min(foreign, key=lambda each: (each != stated, len(foreign[each])))
    wrong = foreign[nearest]
    raise UsageError(
        f"{root} has local edits, a part of the change, or another release than "
        f"{known}. Nearest is {nearest}, but not in "
        f"{', '.join(wrong[:5])}{' and more' * (len(wrong) > 5)}. Restore vLLM's own "
        "files, and remove fp8_tp_padding/ where it is left over."
    )


def _check_writable(file: Path) -> None:
    folder = next(parent for parent in file.parents if parent.is_dir())
    for place in (folder, *([file] if file.exists() else [])):
        # Root may write everywhere, and should not where its owner does not.
        if not os.access(place, os.W_OK) or not place.stat().st_mode & stat.S_IWUSR:
            raise UsageError(f"{place} is read-only: make it writable, or copy TREE.")


@signals_held()
def _write_all(root: Path, files: Files) -> None:
    """Write, or remove, all files.

    Old and new content is written beside each file first. Then new files take their
    place, ones that change (vLLM's own, which need the new ones), and ones that go; so
    that putting all back takes renames only.

    Raises:
        UsageError: A file could not be written. The tree is as it was, or the message
            names what is not.

    """
    before = contents(root, files)
    changed = [path for path in files if files[path] != before[path]]
    changed.sort(key=lambda path: (files[path] is None) - (before[path] is None))
    places = {path: (root / path).resolve() for path in changed}
    beside = [Path(f"{file}{end}") for file in places.values() for end in (NEW, OLD)]
    if left := [str(file) for file in beside if file.exists()]:
        raise UsageError(
            f"{', '.join(left)} was left by a run that was killed. Look whether vLLM's "
            "own files are what you want, restore them if not, and remove it."
        )
    folders = {p for file in places.values() for p in file.parents if not p.exists()}
    taken = []
    try:
        for path, file in places.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            _write_beside(file, OLD, before[path])
            _write_beside(file, NEW, files[path])
        for path, file in places.items():
            taken.append(path)
            _take_place(file, NEW, files[path])
    except BaseException as error:
        for path in taken:
            with suppress(OSError):
                _take_place(places[path], OLD, before[path])
        wrong = [path for path, _ in contents(root, files).items() - before.items()]
        if not wrong:
            remove(beside, folders)
        if wrong:
            raise UsageError(
                f"{error!r}. These could not be put back: {', '.join(sorted(wrong))}; "
                f"what they held is in files that end in {OLD}."
            ) from error
        if isinstance(error, OSError):
            raise UsageError(f"{error}. {root} is as it was before.") from error
        raise
    remove(beside, set())
    for file in (places[path] for path in changed if files[path] is None):
        cache = file.parent / "__pycache__"
        remove(cache.glob(f"{file.stem}.*.pyc"), {cache, *file.parents})


def _write_beside(file: Path, end: str, content: bytes | None) -> None:
    if content is not None:
        Path(f"{file}{end}").write_bytes(content)
        if file.exists():
            shutil.copymode(file, f"{file}{end}")


def _take_place(file: Path, end: str, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
    else:
        os.replace(f"{file}{end}", file)
