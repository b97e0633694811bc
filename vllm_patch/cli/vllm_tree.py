# SPDX-License-Identifier: Apache-2.0
"""A folder that holds vLLM's source: what it is, and what state it is in."""

import re
from enum import Enum
from pathlib import Path

from packaging.version import InvalidVersion, Version

from vllm_patch.cli.errors import UsageError
from vllm_patch.cli.patch_series import Series, blob_hash, content_of

# In a git checkout, an unpacked source distribution and site-packages alike.
MARKS = ("vllm/__init__.py", "vllm/envs.py", "vllm/model_executor/layers")


class State(Enum):
    """What of a series a tree has."""

    PRISTINE = "none of the patches"
    APPLIED = "all of the patches"
    MIXED = "a part of the patches"
    EDITED = "files that are neither vLLM's nor patched"


class VllmTree:
    """A folder that holds ``vllm/``.

    Args:
        root: The folder: a git checkout, an unpacked source distribution, or
            site-packages, which lacks the tests and gets none.

    Raises:
        UsageError: The folder does not hold vLLM.

    """

    def __init__(self, root: Path):
        self.root = root
        if not root.is_dir():
            raise UsageError(f"{root} is no folder. Give the one that holds vllm/.")
        missing = [mark for mark in MARKS if not (root / mark).exists()]
        if not missing:
            return
        hint = "the folder that holds vllm/: a checkout, an sdist, or site-packages"
        if (root / "envs.py").is_file() and root.resolve().name == "vllm":
            hint = f"{root.resolve().parent}, which holds it"
        raise UsageError(f"{root} is not a vLLM tree: no {missing[0]}. Give {hint}.")

    def release(self) -> str | None:
        """Return the version that the tree states, without its local part, or None.

        Raises:
            UsageError: What it states is no version.

        """
        stated, file = self._statement()
        if stated is None:
            return None
        try:
            return Version(stated).public
        except InvalidVersion:
            raise UsageError(
                f"{file} states the version {stated!r}, which is none. Is this a "
                "release of vLLM?"
            ) from None

    @property
    def release_file(self) -> Path | None:
        """The file that states the release."""
        return self._statement()[1]

    def _statement(self) -> tuple[str, Path] | tuple[None, None]:
        for name, pattern in (
            ("vllm/_version.py", r"^__version__ = (?:version = )?['\"](.+)['\"]"),
            ("PKG-INFO", r"^Version: (.+)"),
        ):
            content = content_of(self.root / name)
            stated = content and re.search(
                pattern, content.decode(errors="replace"), re.MULTILINE
            )
            if stated:
                return stated[1].strip(), self.root / name
        return None, None

    def paths(self, series: Series) -> list[str]:
        """Return the files of a series that belong into this tree."""
        source = (self.root / "pyproject.toml").is_file()
        return [p for p in series.contents if source or p.startswith("vllm/")]

    def found(self, series: Series) -> dict[str, str]:
        """Return the hash of each file that the series means."""
        return {p: blob_hash(content_of(self.root / p)) for p in self.paths(series)}

    def state(self, series: Series) -> State:
        """Compare the tree's files with those before and after the series."""
        contents = series.contents
        if self.edited(series):
            return State.EDITED
        found = self.found(series).items()
        if all(blob == contents[path][0] for path, blob in found):
            return State.PRISTINE
        if all(blob == contents[path][-1] for path, blob in found):
            return State.APPLIED
        return State.MIXED

    def edited(self, series: Series) -> list[str]:
        """Return the files that are neither vLLM's nor any patch's."""
        found = self.found(series).items()
        return [path for path, blob in found if blob not in series.contents[path]]

    def patched(self, series: Series) -> list[str]:
        """Return the files that are as the whole series leaves them."""
        found = self.found(series).items()
        return [path for path, blob in found if blob == series.contents[path][-1]]
