# SPDX-License-Identifier: Apache-2.0
"""Bytes of a layer's weights and scales on a rank, as it is stored there."""

from vllm_patch.cli.check.layers import Layer
from vllm_patch.cli.check.stock import Answer


def sliced(
    layer: Layer, tp: int, block: tuple[int, int], rank: int, is_padded: bool
) -> int:
    """Return bytes of a rank's own elements, and of the scales of their blocks.

    Args:
        layer: What ranks share.
        tp: How many they are.
        block: Rows and columns of a quant block.
        rank: One of them.
        is_padded: Whether elements come in whole blocks, as this package pads them.

    """
    block_n, block_k = block
    dimensions = layer.dimensions(tp)
    by_rows = layer.inputs, _ceil(layer.inputs, block_k)
    by_columns = layer.outputs[0], _ceil(layer.outputs[0], block_n)
    if layer.kind == "row":
        parts = [(dimensions[0], block_k, by_columns)]
    elif layer.kind == "experts":
        # Down's rows are the inputs of gate and up.
        hidden = layer.inputs, _ceil(layer.inputs, block_n)
        parts = [(dimensions[0], block_n, by_rows)] * len(layer.outputs)
        parts += [(dimensions[0], block_k, hidden)]
    else:
        parts = [(each, block_n, by_rows) for each in dimensions]
    total = 0
    for dimension, unit, (elements, blocks) in parts:
        shard = dimension.shard(unit, rank)
        total += (shard.span if is_padded else shard.size) * elements
        total += layer.scale_bytes * shard.num_blocks * blocks
    return layer.experts * total


def in_stock(
    layer: Layer, tp: int, block: tuple[int, int], rank: int, answer: Answer
) -> int:
    """Return bytes that a rank of stock vLLM allocates for a layer that it loads."""
    sizes = [dimension.size for dimension in layer.dimensions(tp)]
    block_n, block_k = block
    if answer.kind == "refined":
        block_n = block_k = answer.block
    if answer.kind == "shared":
        sizes = [answer.block]
    if layer.kind == "experts":
        up, hidden, count = sizes[0], layer.inputs, len(layer.outputs)
        weights = (count + 1) * up * hidden
        scales = count * _ceil(up, block_n) * _ceil(hidden, block_k)
        scales += _ceil(hidden, block_n) * _ceil(up, block_k)
    else:
        is_row = layer.kind == "row"
        rows = layer.outputs[0] if is_row else sum(sizes)
        columns = sizes[0] if is_row else layer.inputs
        weights = rows * columns
        scales = _ceil(rows, block_n) * _ceil(columns, block_k)
    return layer.experts * (weights + layer.scale_bytes * scales)


def _ceil(size: int, block: int) -> int:
    return -(-size // block)
