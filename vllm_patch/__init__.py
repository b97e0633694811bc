# SPDX-License-Identifier: Apache-2.0
"""Block-FP8 vLLM models at any tensor-parallel size.

Importing this package changes nothing; vLLM calls ``vllm_patch.plugin.register``.
"""

__version__ = "0.1.0"
__all__ = ["BlockShard", "__version__", "block_shard"]


def __getattr__(name: str):
    if name in ("BlockShard", "block_shard"):
        from vllm_patch.fp8_tp_padding import shard

        return getattr(shard, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
