# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loads linear layers: what vLLM calls, on top of ``SlicedTensors``."""

import functools
from collections.abc import Iterator
from itertools import accumulate, pairwise
from types import MethodType

import torch

from ..slices.linear_layout import LinearLayout
from .sliced_tensor import SlicedTensor, SlicedTensors

QKV_SHARDS = {"q": 0, "k": 1, "v": 2}


def linear_tensors(layout: LinearLayout, scale_name: str) -> list[SlicedTensor]:
    """Return weight and scale of each logical shard, one after the other.

    Args:
        layout: The layer's slices.
        scale_name: Name of the parameter that holds block scales.

    """
    weights = layout.output_windows(), layout.input_window()
    scales = layout.output_blocks(), layout.input_blocks()
    tensors = []
    for name, kind, (outputs, inputs) in (
        ("weight", "weight", weights),
        (scale_name, "scale", scales),
    ):
        offset = 0
        for index, window in enumerate(outputs):
            windows = window, inputs
            tensors.append(SlicedTensor(name, index, kind, windows, offset))
            offset += window.span
    return tensors


def linear_loader(
    layer: torch.nn.Module,
    stock_loader: MethodType,
    tensors: SlicedTensors,
    name: str,
    layout: LinearLayout,
) -> MethodType:
    """Return ``stock_loader``'s replacement for one parameter of sliced tensors.

    Args:
        layer: The linear layer that owns the parameter.
        stock_loader: The layer's loader; its signature is kept.
        tensors: The layer's, from ``linear_tensors``.
        name: Name of the parameter.
        layout: The layer's slices.

    """
    slots = tensors.of(name)

    @functools.wraps(stock_loader.__func__)
    def weight_loader(layer, param, loaded_weight, loaded_shard_id=None):
        if isinstance(loaded_shard_id, (int, str)):
            indices = [QKV_SHARDS.get(loaded_shard_id, loaded_shard_id)]
        elif loaded_shard_id is None:
            indices = list(slots)
        else:
            indices = list(loaded_shard_id)
        values = [loaded_weight]
        if len(indices) > 1:
            block = layout.outputs[0].block
            unit = block if slots[indices[0]].kind == "scale" else 1
            totals = {i: layout.outputs[i].total for i in indices}
            try:
                values = list(_split(loaded_weight, totals, unit))
            except ValueError as error:
                tensors.refuse(f"{name} {error}")
        for index, value in zip(indices, values, strict=True):
            tensors.load(slots[index], param, value, name)

    return MethodType(weight_loader, layer)


def _split(
    fused: torch.Tensor, totals: dict[int, int], unit: int
) -> Iterator[torch.Tensor]:
    """Cut a tensor that is fused on disk into its logical shards.

    Scales tell by their number whether weights were quantized before they were fused,
    each shard on blocks of its own, or after it.

    Args:
        fused: ``[rows, ...]``.
        totals: Logical shard -> output elements, in the tensor's order.
        unit: Elements that one row stands for: 1, or a quant block.

    Raises:
        ValueError: It has other rows, or a shard shares one of its blocks.

    """
    places = list(pairwise(accumulate(totals.values(), initial=0)))
    before = [-(-total // unit) for total in totals.values()]
    after = -(-places[-1][1] // unit)
    rows = fused.shape[0] if fused.ndim else 0
    if rows not in (sum(before), after):
        needed = " or ".join(map(str, sorted({after, sum(before)})))
        raise ValueError(
            f"is fused on disk and has shape {tuple(fused.shape)}, but logical shards "
            f"{list(totals)} need {needed} rows. Check the layer's sizes and "
            "weight_block_size in config.json against the checkpoint."
        )
    if rows != after:
        yield from fused.split(before)
        return
    for index, (start, end) in zip(totals, places, strict=True):
        # A shard inside one block has that block's scale.
        if start % unit and start // unit != (end - 1) // unit:
            raise ValueError(
                f"is fused on disk, and logical shard {index} starts at row {start}, "
                f"inside a quant block of {unit}, and ends in another one, which is "
                "not supported. Use a checkpoint with separate tensors."
            )
        yield fused[start // unit : -(-end // unit)]
