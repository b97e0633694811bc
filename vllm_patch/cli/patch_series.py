# SPDX-License-Identifier: Apache-2.0
"""The series of git patches that come with this package, one for each release."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

import vllm_patch

NO_FILE = "0" * 40
_CHANGE = re.compile(
    r"^diff --git a/(?P<path>.+) b/(?P=path)\n(?:(?:new|deleted) file mode \d+\n)?"
    r"index (?P<before>[0-9a-f]{40})\.\.(?P<after>[0-9a-f]{40})",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Series:
    """The patches of one vLLM release, in order, and what they do to which file.

    Attributes:
        release: The vLLM release.
        patches: The patches.
        contents: Path in the tree -> git blob hashes of the file: before the series,
            after each patch that changes it; ``NO_FILE`` where there is none.

    """

    release: str
    patches: tuple[Path, ...]
    contents: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, folder: Path) -> "Series":
        """Read a folder ``vX.Y.Z`` that holds ``series`` and the patches it names."""
        names = (folder / "series").read_text().split()
        patches = tuple(folder / name for name in names)
        contents: dict[str, tuple[str, ...]] = {}
        for patch in patches:
            for change in _CHANGE.finditer(patch.read_text()):
                path = change["path"]
                contents.setdefault(path, (change["before"],))
                contents[path] += (change["after"],)
        return cls(folder.name.removeprefix("v"), patches, contents)


def read_all() -> dict[str, Series]:
    """Return every series of this package by release, oldest first."""
    folders = folder().glob("v*/series")
    series = [Series.read(path.parent) for path in folders]
    return {s.release: s for s in sorted(series, key=lambda s: Version(s.release))}


def folder() -> Path:
    """Return where the series are: in the installed package, or in its repository."""
    package = Path(vllm_patch.__file__).parent
    installed = package / "patches"
    return installed if installed.is_dir() else package.parent / "patches"


def content_of(file: Path) -> bytes | None:
    """Return what a file holds, or None if there is no such file."""
    return file.read_bytes() if file.is_file() else None


def blob_hash(content: bytes | None) -> str:
    """Return the hash by which git's patches name a file's content."""
    if content is None:
        return NO_FILE
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
