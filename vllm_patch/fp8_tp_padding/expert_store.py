# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Decides whether experts are stored with padding or without."""

import torch

import vllm.envs as envs
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from .shard import block_shard

# The masked kernels hold a rank's activations in registers.
MAX_BLOCKS = 4


def why_padded(
    layer: torch.nn.Module, experts_cls: type | None, block: int
) -> str | None:
    """Return why experts need whole blocks and stock kernels, or None.

    Without a reason they are stored compactly, for ``MaskedTritonExperts``.

    Args:
        layer: The ``RoutedExperts`` layer, whose columns are cut inside a block.
        experts_cls: What vLLM picked for the padded layer.
        block: Elements of one quant block.

    """
    moe = layer.moe_config
    if envs.VLLM_FP8_TP_PADDING == "padded":
        return "VLLM_FP8_TP_PADDING=padded"
    if not HAS_TRITON or not _is_triton(experts_cls):
        return f"{getattr(experts_cls, '__name__', None)} takes whole blocks"
    if not current_platform.is_cuda():
        return "masked kernels are written for CUDA"
    if block != 128:
        return f"masked kernels take blocks of 128, not {block}"
    if moe.activation != MoEActivation.SILU or not moe.is_act_and_mul:
        return f"masked kernels compute SiLU and gate, not {moe.activation.value}"
    if getattr(layer, "swiglu_limit", None) is not None:
        return "masked kernels do not clamp the activation"
    if moe.has_bias:
        return "masked kernels add no biases"
    if envs.VLLM_BATCH_INVARIANT:
        return "masked kernels depend on the batch size"
    ranks = range(moe.tp_size)
    shards = [block_shard(moe.intermediate_size, block, r, moe.tp_size) for r in ranks]
    most = max(shard.num_blocks for shard in shards)
    if most > MAX_BLOCKS:
        return f"masked kernels take up to {MAX_BLOCKS} blocks a rank, not {most}"
    return None


def _is_triton(experts_cls: type | None) -> bool:
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    return experts_cls is TritonExperts
