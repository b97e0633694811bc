# SPDX-License-Identifier: Apache-2.0
"""Block-FP8 vLLM models at any tensor-parallel size.

Importing this package changes nothing; vLLM calls ``vllm_patch.plugin.register``.
"""

from vllm_patch.fp8_tp_padding.slices.shard import BlockShard, block_shard

__all__ = ["BlockShard", "__version__", "block_shard"]


def __getattr__(name: str) -> str:
    """Return ``__version__`` as it was installed: that of git's tags."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version("vllm-patch")
    except metadata.PackageNotFoundError:
        return "0+unknown"
