# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Launches the masked kernels: routed experts on compact weights.

``PairPlan`` runs few tokens, each pair alone, and ``SortedPlan`` many, in blocks of
pairs. Both quantize the input, and multiply by gate and up; then the first has down sum
a token's experts as it goes, and the second writes each pair's output and sums.
The kernels are Triton's, but for one in Gluon.
"""

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from vllm.triton_utils import triton

from ..slices.shard import BlockShard
from .dependent_launch import dependent_launch
from .fp8_quant import BLOCK, FP8
from .launches import Launch, Launches
from .masked_activation import Activation
from .masked_kernels import (
    down_and_sum_kernel,
    down_kernel,
    gate_up_kernel,
    sum_kernel,
)
from .pair_kernels import prepare_kernel, sort_kernel
from .tiles import (
    SPECIALIZED_BLOCKS,
    SPECIALIZED_M,
    PairTiles,
    SortedTiles,
    Tiles,
    are_found,
)
from .warp_specialization import TILE, hopper_gate_up
from .workspace import Buffers

# Output columns that one program sums.
SUM_COLUMNS = 1024
# Programs that count pairs.
MAX_CHUNKS = 16
# Pairs that one program places.
SORTED_PAIRS = 128
# Rows of an operand of a matrix product: a pair that is not sorted comes alone.
LEAST_ROWS = 16
# Among fewer pairs, programs look for those of a block as among so many.
LEAST_FOUND = 128
# Where sorted pairs lie, in the workspace.
PLACES = "sorted_pairs", "block_experts", "num_blocks"


@dataclass(frozen=True)
class Problem:
    """Sizes of one call.

    Attributes:
        num_tokens: Tokens.
        top_k: Experts of a token.
        hidden: Hidden size, a multiple of 128.
        num_experts: Experts that ``topk_ids`` may name.
        shard: The rank's intermediate columns.
        dtype: Of the activations.
        mul_weight: Whether to weight the experts' outputs.
        activation: Of gate and up.

    """

    num_tokens: int
    top_k: int
    hidden: int
    num_experts: int
    shard: BlockShard
    dtype: torch.dtype
    mul_weight: bool = True
    activation: Activation = Activation()

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.top_k


@dataclass(frozen=True)
class Weights:
    """One rank's experts, compact.

    Attributes:
        w13: ``[experts, 2 * size, hidden]`` float8_e4m3fn, gate rows then up rows; or
            ``[experts, size, hidden]``, with scales likewise, where there is no gate.
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
    """Experts of each token.

    Attributes:
        weights: ``[num_tokens, top_k]`` float32, contiguous.
        ids: ``[num_tokens, top_k]`` integers, contiguous; slots that name no expert,
            as those of padding tokens do, count nothing.

    """

    weights: torch.Tensor
    ids: torch.Tensor


def plan_for(problem: Problem, tiles: Tiles) -> "PairPlan | SortedPlan":
    """Return the plan that these tiles are for."""
    if isinstance(tiles, PairTiles):
        return PairPlan(problem, tiles)
    if tiles.specialized and not can_specialize(problem):
        tiles = replace(tiles, specialized=False)
    return SortedPlan(problem, tiles)


def can_specialize(problem: Problem) -> bool:
    """Whether warps that specialize, on Hopper, multiply this by gate and up.

    They take two quant blocks along K at a time, have offsets of 32 bits into the
    input, and do not find pairs by themselves.
    """
    return (
        hopper_gate_up() is not None
        and problem.activation.shards == 2
        and problem.hidden % (2 * BLOCK) == 0
        and problem.num_tokens * problem.hidden <= 2**32
        and not are_found(problem.num_pairs, SPECIALIZED_M)
    )


@dataclass(frozen=True)
class _Plan:
    """What both plans share.

    Attributes:
        problem: Sizes of the call.
        tiles: Of the kernels.
        quant_groups: Activation groups that one program quantizes, at most.
        placed: How programs know the pairs of a block, as ``block_of_pairs`` says.
        splits: Programs that share a tile of gate and up.
        searched: Pairs among which a program looks for those of its block.

    """

    problem: Problem
    tiles: Tiles
    quant_groups: ClassVar[int]
    placed: ClassVar[str] = "alone"
    splits: ClassVar[int] = 1
    searched: ClassVar[int] = 0

    def buffers(self) -> Buffers:
        """Shape and dtype of each intermediate."""
        problem = self.problem
        groups = problem.hidden // BLOCK
        return {
            "x_codes": ((problem.num_tokens, problem.hidden), FP8),
            "x_scale": ((problem.num_tokens, groups), torch.float32),
            "h": ((problem.num_pairs, problem.shard.size), problem.dtype),
        }

    @functools.cached_property
    def _prepared(self) -> Launches:
        return Launches(self.launches(), self.buffers())

    @property
    def workspace_bytes(self) -> int:
        return self._prepared.bytes

    def run(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        weights: Weights,
        routing: Routing,
        workspace: torch.Tensor,
    ) -> None:
        """Write this rank's part of the routed experts' output to ``out``.

        Args:
            out: ``[num_tokens, hidden]`` of the problem's dtype, apart from the
                workspace.
            x: ``[num_tokens, hidden]`` of that dtype, contiguous.
            weights: The experts.
            routing: Experts and weights of each token.
            workspace: At least ``workspace_bytes`` bytes, in any state.

        """
        tensors = {
            "out": out,
            "x": x,
            "w13": weights.w13,
            "w2": weights.w2,
            "w13_scale": weights.w13_scale,
            "w2_scale": weights.w2_scale,
            "topk_weights": routing.weights,
            "topk_ids": routing.ids,
        }
        self._prepared.run(tensors, workspace)

    @property
    def blocks(self) -> int:
        """Blocks of pairs: each is one."""
        return self.problem.num_pairs

    @property
    def bins(self) -> int:
        return max(32, triton.next_power_of_2(self.problem.num_experts))

    @property
    def _places(self) -> Sequence[str]:
        return ("topk_ids", *PLACES) if self.placed == "sorted" else ("topk_ids",)

    @property
    def _placing(self) -> dict[str, Any]:
        absent = {f"{name}_ptr": None for name in PLACES if name not in self._places}
        return {
            "BLOCK_M": self.tiles.block_m or LEAST_ROWS,
            "PLACED": self.placed,
            "BINS": self.bins,
            "PAIRS": self.searched,
            "EXPERTS": self.problem.num_experts,
            **absent,
        }

    @property
    def _options(self) -> dict[str, bool]:
        return dependent_launch(self.tiles.pdl)

    @property
    def _geometry(self) -> dict[str, int]:
        shard = self.problem.shard
        return {
            "K": self.problem.hidden,
            "SIZE": shard.size,
            "LEAD": shard.lead,
            "NUM_BLOCKS": shard.num_blocks,
        }

    def _prepare(
        self, chunks: int = 0, counts: Sequence[str] = (), **counting
    ) -> Launch:
        problem = self.problem
        groups = problem.hidden // BLOCK
        each = math.gcd(groups, self.quant_groups)
        if not chunks:
            counting = {"counts_ptr": None, "placed_ptr": None}
            counting |= dict.fromkeys(("EXPERTS", "BINS", "CHUNK"), 0)
        return Launch(
            prepare_kernel,
            chunks + problem.num_tokens * (groups // each),
            ("x", "topk_ids", "x_codes", "x_scale", *counts),
            {
                "num_pairs": problem.num_pairs,
                "chunks": chunks,
                "K": problem.hidden,
                "GROUPS": each,
                **counting,
                **self._options,
            },
        )

    def _gate_up(self) -> Launch:
        problem, tile = self.problem, self.tiles.gate_up
        return Launch(
            gate_up_kernel,
            self.blocks * self.splits * tile.count(problem.shard),
            ("x_codes", "x_scale", "w13", "w13_scale", "h", *self._places),
            {
                "num_pairs": problem.num_pairs,
                "TOP_K": problem.top_k,
                "SPLITS": self.splits,
                "UNROLL": tile.unroll,
                **problem.activation.constants,
                **self._placing,
                **tile.launch_options,
                **self._geometry,
                **self._options,
            },
        )


@dataclass(frozen=True)
class PairPlan(_Plan):
    """Gate and up take each pair alone, and down takes tokens: three launches."""

    tiles: PairTiles
    quant_groups = 8  # Fewer programs would leave most of the GPU idle.

    @property
    def variant(self) -> Hashable:
        """Plans of one geometry that are alike in this launch the same binaries."""
        return self.tiles

    def launches(self) -> list[Launch]:
        """Return what ``run`` launches."""
        return [self._prepare(), self._gate_up(), self._down_and_sum()]

    @property
    def splits(self) -> int:
        return self.tiles.gate_up_splits

    def buffers(self) -> Buffers:
        if self.splits == 1:
            return super().buffers()
        problem = self.problem
        shards = problem.activation.shards
        parts = self.splits, shards, problem.num_pairs, problem.shard.size
        return {**super().buffers(), "h": (parts, torch.float32)}

    def _down_and_sum(self) -> Launch:
        problem, tile = self.problem, self.tiles.down
        columns = triton.cdiv(problem.hidden, tile.block_n)
        return Launch(
            down_and_sum_kernel,
            columns * problem.num_tokens,
            ("h", "w2", "w2_scale", "out", "topk_weights", "topk_ids"),
            {
                "EXPERTS": problem.num_experts,
                "TOP_K": problem.top_k,
                "ROWS": max(LEAST_ROWS, triton.next_power_of_2(problem.top_k)),
                "SPLITS": self.splits,
                **problem.activation.constants,
                "MUL_WEIGHT": problem.mul_weight,
                **tile.launch_options,
                **self._geometry,
                **self._options,
            },
        )


@dataclass(frozen=True)
class SortedPlan(_Plan):
    """Pairs come in blocks of one expert: five launches, or four without sorting."""

    tiles: SortedTiles
    quant_groups = 32

    @property
    def blocks(self) -> int:
        """Most blocks of pairs: each expert may leave one unfilled."""
        pairs, group_m = self.problem.num_pairs, self.tiles.group_m
        unfilled = min(self.problem.num_experts, pairs)
        groups = min(pairs, pairs // group_m + unfilled)
        return groups * (group_m // self.tiles.block_m)

    @property
    def placed(self) -> str:
        are = are_found(self.problem.num_pairs, self.tiles.block_m)
        return "found" if are else "sorted"

    @property
    def searched(self) -> int:
        if self.placed == "sorted":
            return 0
        return max(LEAST_FOUND, triton.next_power_of_2(self.problem.num_pairs))

    def buffers(self) -> Buffers:
        problem = self.problem
        y = (problem.num_pairs, problem.hidden), problem.dtype
        sorting = self._sorting if self.placed == "sorted" else {}
        return {**super().buffers(), **sorting, "y": y}

    @property
    def _sorting(self) -> Buffers:
        blocks = self.blocks
        return {
            # As large for any number of tokens: more of them never need less.
            "counts": ((MAX_CHUNKS, self.bins), torch.int32),
            "placed": ((self.bins,), torch.int32),
            "sorted_pairs": ((blocks * self.tiles.block_m,), torch.int32),
            "block_experts": ((blocks,), torch.int32),
            "num_blocks": ((1,), torch.int32),
        }

    @property
    def chunk(self) -> int:
        """Pairs that one program counts."""
        pairs = self.problem.num_pairs
        least = 1024 if pairs <= 2048 else 4096
        return max(least, triton.next_power_of_2(triton.cdiv(pairs, MAX_CHUNKS)))

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.problem.num_pairs, self.chunk)

    @property
    def variant(self) -> Hashable:
        """As of ``PairPlan``."""
        if self.placed == "found":
            return self.tiles, self.searched
        return self.tiles, self.chunk, self._chunks_bound

    @property
    def _chunks_bound(self) -> int:
        """``chunks``, rounded up to one of two values: each is a variant."""
        return 1 if self.chunks == 1 else MAX_CHUNKS

    @property
    def _counting(self) -> dict[str, int]:
        return {
            "EXPERTS": self.problem.num_experts,
            "BINS": self.bins,
            "CHUNK": self.chunk,
            "num_warps": min(32, max(4, self.chunk // 1024)),
        }

    def launches(self) -> list[Launch]:
        """Return what ``run`` launches."""
        before = [self._prepare()]
        if self.placed == "sorted":
            counts = "counts", "placed"
            before = [
                self._prepare(self.chunks, counts, **self._counting),
                self._sort(),
            ]
        return [*before, self._gate_up(), self._down(), self._sum()]

    def _sort(self) -> Launch:
        problem = self.problem
        return Launch(
            sort_kernel,
            max(problem.num_experts, triton.cdiv(problem.num_pairs, SORTED_PAIRS)),
            ("topk_ids", "counts", "placed", *PLACES),
            {
                "num_pairs": problem.num_pairs,
                "chunks": self.chunks,
                "CHUNKS": self._chunks_bound,
                "EXPERTS": problem.num_experts,
                "BINS": self.bins,
                "PAIRS": SORTED_PAIRS,
                "BLOCK_M": self.tiles.block_m,
                "GROUP_M": self.tiles.group_m,
                **self._options,
            },
        )

    def _gate_up(self) -> Launch:
        if not self.tiles.specialized:
            return super()._gate_up()
        problem, gluon = self.problem, hopper_gate_up()
        tiles = gluon.tiles_of(problem.shard.size, problem.shard.lead)
        constants = dict(problem.activation.constants)
        del constants["SHARDS"]
        return Launch(
            gluon.hopper_gate_up_kernel,
            self.blocks // SPECIALIZED_BLOCKS * tiles,
            ("x_codes", "x_scale", "w13_scale", "h", *PLACES),
            {
                "num_pairs": problem.num_pairs,
                "TOP_K": problem.top_k,
                **constants,
                **self._geometry,
                "num_warps": TILE.num_warps,
            },
            described={
                "w13": gluon.Description(
                    problem.num_experts, problem.shard.size, problem.hidden
                )
            },
            persistent=True,
        )

    def _down(self) -> Launch:
        tiles = self.tiles
        return Launch(
            down_kernel,
            self.blocks * tiles.down_splits,
            ("h", "w2", "w2_scale", "y", "topk_weights", *self._places),
            {
                "num_pairs": self.problem.num_pairs,
                "SPLITS": tiles.down_splits,
                "MUL_WEIGHT": self.problem.mul_weight,
                **self._placing,
                **tiles.down.launch_options,
                **self._geometry,
                **self._options,
            },
        )

    def _sum(self) -> Launch:
        problem = self.problem
        columns = triton.cdiv(problem.hidden, SUM_COLUMNS)
        return Launch(
            sum_kernel,
            problem.num_tokens * columns,
            ("y", "out", "topk_ids"),
            {
                "EXPERTS": problem.num_experts,
                "TOP_K": problem.top_k,
                "K": problem.hidden,
                "BLOCK_N": SUM_COLUMNS,
                **self._options,
            },
        )
