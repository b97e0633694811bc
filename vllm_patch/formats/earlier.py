# SPDX-License-Identifier: Apache-2.0
"""Formats in vLLM releases before the first in which their layers are taken over."""

from collections.abc import Callable
from typing import Any

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm_patch.fp8_tp_padding.methods.experts import cuts_blocks
from vllm_patch.fp8_tp_padding.slices.linear_layout import linear_layout

from .checkpoint_format import BLOCKS, cut_groups
from .left_to_stock import SMALLER_TP, explain


def quant_method(stock: Callable, since: str, config, layer, prefix) -> Any:
    """Return vLLM's method; if it has cut blocks, one whose errors tell since when."""
    method = stock(config, layer, prefix)
    why = cut_groups(method, layer)
    if _is_cut(layer) and _is_in_blocks(method, layer):
        why = f"such checkpoints are padded from vLLM {since} on. {SMALLER_TP}."
    if why:
        explain(method, prefix, why)
    return method


def _is_cut(layer) -> bool:
    if isinstance(layer, RoutedExperts):
        return cuts_blocks(BLOCKS, layer.moe_config)
    layout = linear_layout(layer, BLOCKS[0]) if isinstance(layer, LinearBase) else None
    return layout is not None and layout.is_cut


def _is_in_blocks(method, layer) -> bool:
    names = type(method).__name__, type(getattr(layer, "scheme", None)).__name__
    by_name = any(part in name for part in ("PbWo", "PerBlock") for name in names)
    return by_name or [*(getattr(method, "weight_block_size", None) or [])] == BLOCKS
