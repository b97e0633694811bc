# SPDX-License-Identifier: Apache-2.0
"""Block-FP8 vLLM models at any tensor-parallel size.

Importing this package changes nothing; vLLM calls ``vllm_patch.plugin.register``.
"""

from vllm_patch.fp8_tp_padding.slices.shard import BlockShard, block_shard

__version__ = "0.1.0"
__all__ = ["BlockShard", "__version__", "block_shard"]
