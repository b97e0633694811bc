# SPDX-License-Identifier: Apache-2.0
"""The vLLM releases that are supported; what differs between them belongs here."""

import importlib.util
import re
from contextlib import suppress
from pathlib import Path

from packaging.version import InvalidVersion, Version

SUPPORTED = (
    "0.26.0",
    "0.27.0",
    "0.27.1",
    "0.28.0",
    "0.29.0",
    "0.30.0",
    "0.31.0",
    "0.32.0",
    "0.33.0",
)


def is_supported(vllm_version: str) -> bool:
    """Whether a version string, local part aside (``0.32.0+cpu``), is supported.

    So is a later patch release (``0.33.1``), untested: if a target of the patch table
    has other parameters there, vLLM stays stock.
    """
    try:
        version = Version(vllm_version)
    except InvalidVersion:
        return False
    if version.is_prerelease:
        return False
    return any(
        version.release[:2] == known.release[:2] and version >= known
        for known in map(Version, SUPPORTED)
    )


def stated(tree: Path) -> str | None:
    """Return the release that a source tree states; checkouts and their builds do not.

    Args:
        tree: Folder that holds ``vllm/``.

    """
    for file in tree / "vllm" / "_version.py", tree / "PKG-INFO":
        with suppress(InvalidVersion):
            version = Version(_version_in(file))
            return None if version.is_devrelease else version.public
    return None


def package() -> Path | None:
    """Return the folder of the vLLM that Python would import, or None.

    Nothing of vLLM is imported for the answer.
    """
    found = importlib.util.find_spec("vllm")
    # A folder that an uninstallation left behind has no origin.
    return Path(found.origin).parent if found and found.origin else None


def installed() -> str | None:
    """Return ``vllm.__version__``, read and not imported; None without a vLLM."""
    folder = package()
    return folder and (_version_in(folder / "_version.py") or "dev")


def _version_in(file: Path) -> str:
    text = file.read_text() if file.is_file() else ""
    pattern = r"^(?:Version: |__version__ = .*?['\"])([^'\"\s]+)"
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else ""
