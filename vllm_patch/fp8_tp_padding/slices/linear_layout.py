# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which slices of its checkpoint tensors a linear layer holds on this rank."""

from dataclasses import dataclass

import torch

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from .shard import BlockShard, block_shard
from .window import Window


@dataclass(frozen=True)
class Dimension:
    """One dimension of a checkpoint tensor, and this rank's part of it.

    Attributes:
        total: Elements in the checkpoint.
        tp_rank: Which part this rank holds; ranks that share a KV head hold the
            same part.
        tp_size: Number of parts.
        block: Elements of one quant block.

    """

    total: int
    tp_rank: int
    tp_size: int
    block: int

    @property
    def size(self) -> int:
        return self.total // self.tp_size

    @property
    def is_cut(self) -> bool:
        """Whether some part starts or ends inside a quant block."""
        return self.size % self.block != 0

    @property
    def shard(self) -> BlockShard:
        return block_shard(self.total, self.block, self.tp_rank, self.tp_size)

    @property
    def elements(self) -> Window:
        return Window.of_elements(self.shard, self.total)

    @property
    def blocks(self) -> Window:
        return Window.of_blocks(self.shard, self.total, self.block)


@dataclass(frozen=True)
class LinearLayout:
    """The logical shards of a linear layer, in the order of its output.

    Attributes:
        outputs: Output dimension of each logical shard (q, k, v; gate, up; ...).
        input: The input dimension.
        pads_input: Row parallel: the input is cut, and outputs are whole.

    """

    outputs: tuple[Dimension, ...]
    input: Dimension
    pads_input: bool

    @property
    def is_cut(self) -> bool:
        if self.pads_input:
            return self.input.is_cut
        # As in vLLM, a partial block at the very end of a whole tensor is fine.
        *others, last = self.outputs
        return any(output.is_cut for output in others) or (
            last.is_cut and last.tp_size > 1
        )

    def output_windows(self) -> list[Window]:
        if self.pads_input:
            return [Window.whole(output.total) for output in self.outputs]
        return [output.elements for output in self.outputs]

    def input_window(self) -> Window:
        if self.pads_input:
            return self.input.elements
        return Window.whole(self.input.total)

    def output_blocks(self) -> list[Window]:
        return [output.blocks for output in self.outputs]

    def input_blocks(self) -> Window:
        return self.input.blocks


def linear_layout(layer: torch.nn.Module, block: int) -> LinearLayout | None:
    """Return the layout of a layer that tensor parallelism splits, or None."""
    if not isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
        return None
    tp_rank, tp_size = layer.tp_rank, layer.tp_size
    if isinstance(layer, RowParallelLinear):
        return LinearLayout(
            outputs=(Dimension(layer.output_size, 0, 1, block),),
            input=Dimension(layer.input_size, tp_rank, tp_size, block),
            pads_input=True,
        )
    if isinstance(layer, QKVParallelLinear):
        outputs = _qkv(layer, block)
    else:
        merged = isinstance(layer, MergedColumnParallelLinear)
        sizes = layer.output_sizes if merged else [layer.output_size]
        outputs = tuple(Dimension(size, tp_rank, tp_size, block) for size in sizes)
    return LinearLayout(
        outputs, Dimension(layer.input_size, 0, 1, block), pads_input=False
    )


def _qkv(layer: QKVParallelLinear, block: int) -> tuple[Dimension, ...]:
    replicas = layer.num_kv_head_replicas
    kv_rank, kv_size = layer.tp_rank // replicas, layer.tp_size // replicas
    heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
    return (
        Dimension(heads * layer.head_size, layer.tp_rank, layer.tp_size, block),
        Dimension(kv_heads * layer.head_size, kv_rank, kv_size, block),
        Dimension(kv_heads * layer.v_head_size, kv_rank, kv_size, block),
    )


def has_stock_loader(layer: torch.nn.Module) -> bool:
    """Whether the layer places its shards as vLLM's own classes do."""
    kind = type(layer)
    return any(
        kind.weight_loader is stock.weight_loader
        and kind.weight_loader_v2 is stock.weight_loader_v2
        for stock in (
            RowParallelLinear,
            ColumnParallelLinear,
            MergedColumnParallelLinear,
            QKVParallelLinear,
        )
    )
