# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Cuts a rank's columns out of LoRA adapters of padded experts.

vLLM puts them at the start of buffers of the padded size, and so next to the columns of
other weights. Decorators of its functions put them where the weights have them.
"""

import functools
from collections.abc import Callable

import torch

from ..slices.window import Window


def _sliced(dim: int, parts: int = 1) -> Callable[[Callable], Callable]:
    """Return a decorator of one of ``FusedMoEWithLoRA``'s functions.

    Args:
        dim: Dimension of a factor ``[experts, ...]`` that holds the experts' columns.
        parts: How many projections' columns lie there, one after the other.

    """

    def decorate(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(stock)
        def slice_factor(self, factor: torch.Tensor) -> torch.Tensor:
            moe = self.moe_config
            shard = getattr(moe, "fp8_tp_shard", None)
            # vLLM's dummies, all zeros, have the size of its buffers.
            if shard is None or factor.shape[dim] != parts * moe.intermediate_size:
                return stock(self, factor)
            window = Window.of_elements(shard, moe.intermediate_size)
            cut = [window.cut(part, dim) for part in factor.chunk(parts, dim)]
            return cut[0] if parts == 1 else torch.cat(cut, dim)

        slice_factor.cuts_padded_experts = True
        return slice_factor

    return decorate


gate_or_up = _sliced(dim=1)
gate_and_up = _sliced(dim=1, parts=2)
down = _sliced(dim=2)


def are_cut() -> bool:
    """Whether vLLM's functions are decorated."""
    from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA

    functions = (
        FusedMoEWithLoRA._slice_w13_b,
        FusedMoEWithLoRA._slice_w2_a,
        FusedMoE3DWithLoRA._slice_w13_b,
    )
    return all(hasattr(function, "cuts_padded_experts") for function in functions)
