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
    """Whether a version string, local part aside (``0.32.0+cpu``), is supported."""
    try:
        return Version(vllm_version).public in SUPPORTED
    except InvalidVersion:
        return False
