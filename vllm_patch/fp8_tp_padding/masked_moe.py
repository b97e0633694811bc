# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs the masked kernels: block-FP8 experts on a compact store."""

from dataclasses import dataclass
from math import prod

import torch

from vllm.triton_utils import triton

from .dependent_launch import dependent_launch
from .masked_kernels import (
    down_and_sum_kernel,
    down_kernel,
    gate_up_kernel,
    prepare_kernel,
    sort_kernel,
    sum_kernel,
)
from .shard import BlockShard
from .tiles import BLOCK, Tiles

FP8 = torch.float8_e4m3fn
# Activation groups that one program quantizes, and output columns that one sums.
QUANT_GROUPS = 8
SUM_COLUMNS = 1024
# Programs that count or place an expert's pairs.
MAX_CHUNKS = 16


@dataclass(frozen=True)
class Problem:
    """Sizes of one call.

    Attributes:
        num_tokens: Tokens.
        top_k: Experts of a token.
        hidden: Hidden size, a multiple of 128.
        num_ids: Experts that ``topk_ids`` may name.
        shard: The rank's intermediate columns.
        dtype: Of the activations.
        tiles: Tile sizes for this number of tokens.

    """

    num_tokens: int
    top_k: int
    hidden: int
    num_ids: int
    shard: BlockShard
    dtype: torch.dtype
    tiles: Tiles

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.top_k

    @property
    def bins(self) -> int:
        return max(32, triton.next_power_of_2(self.num_ids))

    @property
    def chunk(self) -> int:
        """Pairs that one program counts or places."""
        least = 1024 if self.num_pairs <= 2048 else 4096
        most = triton.cdiv(self.num_pairs, MAX_CHUNKS)
        return max(least, triton.next_power_of_2(most))

    @property
    def sort_options(self) -> dict[str, int]:
        num_warps = min(32, max(4, self.chunk // 1024))
        return {
            "NUM_IDS": self.num_ids,
            "BINS": self.bins,
            "CHUNK": self.chunk,
            "num_warps": num_warps,
        }

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.num_pairs, self.chunk) if self.tiles.sort else 0

    @property
    def pair_blocks(self) -> int:
        """Most blocks of pairs: each expert may leave one unfilled."""
        pairs = self.num_pairs
        if not self.tiles.sort:
            return pairs
        return min(pairs, pairs // self.tiles.block_m + min(self.num_ids, pairs))

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each intermediate."""
        pairs, hidden, shard = self.num_pairs, self.hidden, self.shard
        quantized = self.tiles.quantize_in_gate_up
        blocks = self.pair_blocks if self.tiles.sort else 0
        return {
            "x_codes": ((self.num_tokens, hidden), FP8),
            "x_scale": ((self.num_tokens, hidden // BLOCK), torch.float32),
            "h": ((pairs, shard.size), FP8 if quantized else self.dtype),
            "h_scale": ((pairs, shard.num_blocks if quantized else 0), torch.float32),
            "counts": ((self.chunks, self.bins), torch.int32),
            "sorted_pairs": ((blocks * self.tiles.block_m,), torch.int32),
            "block_experts": ((blocks,), torch.int32),
            "num_blocks": ((1,), torch.int32),
            "y": ((pairs if self.tiles.sort else 0, hidden), self.dtype),
        }

    @property
    def workspace_bytes(self) -> int:
        return sum(_aligned(prod(s) * d.itemsize) for s, d in self.buffers().values())

    def carve(self, workspace: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the intermediates, as views of ``workspace``."""
        if workspace.nbytes < self.workspace_bytes:
            raise ValueError(
                f"The workspace has {workspace.nbytes} bytes, but {self.num_tokens} "
                f"tokens of {self.dtype} need {self.workspace_bytes}."
            )
        raw, offset, views = workspace.view(-1).view(torch.uint8), 0, {}
        for name, (shape, dtype) in self.buffers().items():
            num_bytes = prod(shape) * dtype.itemsize
            views[name] = raw[offset : offset + num_bytes].view(dtype).view(shape)
            offset += _aligned(num_bytes)
        return views


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 256) * 256


@dataclass(frozen=True)
class Weights:
    """One rank's experts, on a compact store.

    Attributes:
        w13: ``[experts, 2 * size, hidden]`` float8_e4m3fn, gate rows then up rows.
        w2: ``[experts, hidden, size]`` float8_e4m3fn.
        w13_scale: ``[experts, 2 * num_blocks, hidden / 128]`` float32.
        w2_scale: ``[experts, hidden / 128, num_blocks]`` float32.

    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """Where tokens go.

    Attributes:
        weights: ``[num_tokens, top_k]`` float32.
        ids: ``[num_tokens, top_k]`` integers; -1 for padding tokens.
        expert_map: ``[num_ids]`` int32 local experts, -1 for remote ones; or None.
        mul_weight: Whether to weight the experts' outputs.

    """

    weights: torch.Tensor
    ids: torch.Tensor
    expert_map: torch.Tensor | None = None
    mul_weight: bool = True


def masked_moe(
    out: torch.Tensor,
    x: torch.Tensor,
    weights: Weights,
    routing: Routing,
    problem: Problem,
    workspace: torch.Tensor,
) -> None:
    """Write this rank's part of the routed experts' output to ``out``.

    Args:
        out: ``[num_tokens, hidden]`` of ``problem.dtype``, apart from the workspace.
        x: ``[num_tokens, hidden]`` of ``problem.dtype``, contiguous.
        weights: The experts.
        routing: Experts and weights of each token.
        problem: Sizes and tiles.
        workspace: At least ``problem.workspace_bytes`` bytes, in any state.

    """
    call = _Call(problem, problem.carve(workspace), weights, routing)
    call.prepare(x)
    if problem.tiles.sort:
        call.sort()
    call.gate_up()
    if problem.tiles.sort:
        call.down()
        call.sum(out)
    else:
        call.down_and_sum(out)


@dataclass(frozen=True)
class _Call:
    """Launches the kernels on one call's tensors."""

    problem: Problem
    views: dict[str, torch.Tensor]
    weights: Weights
    routing: Routing

    @property
    def _options(self) -> dict[str, bool]:
        return dependent_launch(self.problem.tiles.pdl)

    @property
    def _map(self) -> dict[str, object]:
        mapping = self.routing.expert_map
        return {
            "expert_map_ptr": mapping,
            "NUM_IDS": self.problem.num_ids,
            "HAS_EXPERT_MAP": mapping is not None,
        }

    @property
    def _geometry(self) -> dict[str, int]:
        problem = self.problem
        shard = problem.shard
        return {
            "K": problem.hidden,
            "SIZE": shard.size,
            "LEAD": shard.lead,
            "NUM_BLOCKS": shard.num_blocks,
        }

    def _views(self, *names: str) -> dict[str, torch.Tensor]:
        return {f"{name}_ptr": self.views[name] for name in names}

    def prepare(self, x: torch.Tensor) -> None:
        problem = self.problem
        groups = problem.hidden // BLOCK
        each = next(n for n in (QUANT_GROUPS, 4, 2, 1) if groups % n == 0)
        prepare_kernel[(problem.chunks + problem.num_tokens * (groups // each),)](
            x_ptr=x,
            topk_ids_ptr=self.routing.ids,
            num_pairs=problem.num_pairs,
            chunks=problem.chunks,
            K=problem.hidden,
            GROUPS=each,
            **problem.sort_options,
            **self._views("x_codes", "x_scale", "counts"),
            **self._options,
        )

    def sort(self) -> None:
        problem = self.problem
        sort_kernel[(problem.chunks * problem.num_ids,)](
            topk_ids_ptr=self.routing.ids,
            num_pairs=problem.num_pairs,
            chunks=problem.chunks,
            # Two variants of the kernel, so that none compiles in the middle of things.
            CHUNKS=1 if problem.chunks == 1 else MAX_CHUNKS,
            **problem.sort_options,
            BLOCK_M=problem.tiles.block_m,
            **self._views("counts", "sorted_pairs", "block_experts", "num_blocks"),
            expert_map_ptr=self.routing.expert_map,
            HAS_EXPERT_MAP=self.routing.expert_map is not None,
            **self._options,
        )

    def gate_up(self) -> None:
        problem, tile = self.problem, self.problem.tiles.gate_up
        columns = tile.count(problem.shard)
        gate_up_kernel[(problem.pair_blocks * columns,)](
            w_ptr=self.weights.w13,
            w_scale_ptr=self.weights.w13_scale,
            topk_ids_ptr=self.routing.ids,
            num_pairs=problem.num_pairs,
            TOP_K=problem.top_k,
            BLOCK_M=problem.tiles.block_m,
            SORTED=problem.tiles.sort,
            QUANTIZE=problem.tiles.quantize_in_gate_up,
            UNROLL=tile.unroll,
            **self._views("x_codes", "x_scale", "h", "h_scale"),
            **self._views("sorted_pairs", "block_experts", "num_blocks"),
            **tile.launch_options,
            **self._geometry,
            **self._map,
            **self._options,
        )

    def down(self) -> None:
        problem, tiles = self.problem, self.problem.tiles
        down_kernel[(problem.pair_blocks * tiles.down_splits,)](
            w_ptr=self.weights.w2,
            w_scale_ptr=self.weights.w2_scale,
            topk_weights_ptr=self.routing.weights,
            num_pairs=problem.num_pairs,
            BLOCK_M=tiles.block_m,
            SPLITS=tiles.down_splits,
            MUL_WEIGHT=self.routing.mul_weight,
            QUANTIZED=tiles.quantize_in_gate_up,
            **self._views("h", "h_scale", "y"),
            **self._views("sorted_pairs", "block_experts", "num_blocks"),
            **tiles.down.launch_options,
            **self._geometry,
            **self._options,
        )

    def down_and_sum(self, out: torch.Tensor) -> None:
        problem, tile = self.problem, self.problem.tiles.down
        tiles = triton.cdiv(problem.hidden, tile.block_n)
        down_and_sum_kernel[(tiles * problem.num_tokens,)](
            w_ptr=self.weights.w2,
            w_scale_ptr=self.weights.w2_scale,
            out_ptr=out,
            topk_weights_ptr=self.routing.weights,
            topk_ids_ptr=self.routing.ids,
            TOP_K=problem.top_k,
            ROWS=max(16, triton.next_power_of_2(problem.top_k)),
            MUL_WEIGHT=self.routing.mul_weight,
            QUANTIZED=problem.tiles.quantize_in_gate_up,
            **self._views("h", "h_scale"),
            **tile.launch_options,
            **self._geometry,
            **self._map,
            **self._options,
        )

    def sum(self, out: torch.Tensor) -> None:
        problem = self.problem
        tiles = triton.cdiv(problem.hidden, SUM_COLUMNS)
        sum_kernel[(problem.num_tokens * tiles,)](
            out_ptr=out,
            topk_ids_ptr=self.routing.ids,
            TOP_K=problem.top_k,
            K=problem.hidden,
            BLOCK_N=SUM_COLUMNS,
            **self._views("y"),
            **self._map,
            **self._options,
        )
