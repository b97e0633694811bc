# SPDX-License-Identifier: Apache-2.0
"""The vLLM releases that are supported; what differs between them belongs here."""

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

    So is a later patch release (``0.33.1``): if it changed a target of the patch table,
    vLLM stays stock.
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
