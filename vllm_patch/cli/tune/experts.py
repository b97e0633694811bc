# SPDX-License-Identifier: Apache-2.0
"""A rank's experts on the GPU, with random contents, and calls of them."""

from collections.abc import Sequence
from functools import cached_property, partial

import torch
from triton.errors import TritonError

from vllm_patch.cli.tune import candidates, graph_timing
from vllm_patch.cli.tune.cases import Case
from vllm_patch.cli.tune.errors import worst_columns
from vllm_patch.fp8_tp_padding.kernels import masked_moe
from vllm_patch.fp8_tp_padding.kernels.fp8_quant import BLOCK, FP8
from vllm_patch.fp8_tp_padding.kernels.tile_choice import tiles_for
from vllm_patch.fp8_tp_padding.kernels.tiles import Tiles

# Calls in a graph, each with a routing of its own.
ROUTINGS = 8
# Rows that are compared: in few, one code of the intermediate decides.
COMPARED = 64
# Weights between two uses of an expert, in L2 caches: a model has many layers.
ROTATED_CACHES = 2
MOST_COPIES = 8
# Of 128 columns of two outputs that add in another order: either is up to 2**-8 from
# the exact one. A column too few of 320 is 2**-4.2.
NOISE = 2**-6


class Layer:
    """One rank's experts.

    Args:
        case: Sizes.
        device: Where they are.
        gpu: What is known of it.

    """

    def __init__(self, case: Case, device: torch.device, gpu: candidates.Gpu):
        self.case, self.device, self.gpu = case, device, gpu
        self.generator = torch.Generator(device).manual_seed(0)
        size, blocks = case.shard.size, case.shard.num_blocks
        experts, groups = case.experts, case.hidden // BLOCK
        weights = masked_moe.Weights(
            self._codes(experts, 2 * size, case.hidden),
            self._codes(experts, case.hidden, size),
            self._scales(experts, 2 * blocks, groups),
            self._scales(experts, groups, blocks),
        )
        self.copies = [weights]
        while len(self.copies) < min(MOST_COPIES, self._rotated(weights)):
            copy = {name: tensor.clone() for name, tensor in vars(weights).items()}
            self.copies.append(masked_moe.Weights(**copy))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(
            shape, generator=self.generator, device=self.device, dtype=torch.bfloat16
        )

    def _codes(self, experts: int, *shape: int) -> torch.Tensor:
        codes = torch.empty(experts, *shape, device=self.device, dtype=FP8)
        for expert in codes:
            expert.copy_(self.normal(*shape).to(FP8))
        return codes

    def _scales(self, *shape: int) -> torch.Tensor:
        scales = torch.rand(shape, generator=self.generator, device=self.device)
        return scales.float() * 0.01

    def _rotated(self, weights: masked_moe.Weights) -> int:
        if self.device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return -(-ROTATED_CACHES * cache // (weights.w13.nbytes + weights.w2.nbytes))


def present(case: Case, tokens: int) -> Tiles:
    """Return the tiles that a call takes as it is."""
    return tiles_for(tokens, case.top_k, case.experts, case.hidden, case.shard)


class Batch:
    """Calls for a number of tokens, one for each routing.

    Attributes:
        problem: Sizes of a call.
        present: Tiles that it takes as it is.

    """

    def __init__(self, layer: Layer, tokens: int):
        case, self.layer = layer.case, layer
        self.problem = masked_moe.Problem(
            *(tokens, case.top_k, case.hidden, case.experts, case.shard),
            torch.bfloat16,
        )
        self.present = present(case, tokens)
        self.x = layer.normal(tokens, case.hidden)
        self.out = torch.empty_like(self.x)
        self._differences: dict[Tiles, str | None] = {}
        self.compared = -(-COMPARED // tokens)
        calls = max(ROUTINGS, self.compared)
        self.routings = [self._routing() for _ in range(calls)]

    def _routing(self) -> masked_moe.Routing:
        logits = self.layer.normal(len(self.x), self.problem.num_experts).float()
        weights, ids = logits.softmax(-1).topk(self.problem.top_k)
        return masked_moe.Routing(weights, ids.to(torch.int32))

    def path(self, tiles: Tiles) -> candidates.Path:
        """Return the path that starts with ``tiles``."""
        return candidates.Path(self.problem, self.layer.gpu, self._blocks(tiles), tiles)

    def _blocks(self, tiles: Tiles) -> int:
        if not tiles.block_m:
            return self.problem.num_pairs
        pairs = torch.bincount(self.routings[0].ids.flatten())
        return int((-(-pairs // tiles.block_m)).sum())

    def times(
        self, paths: Sequence[Tiles], replays: int = graph_timing.REPLAYS
    ) -> list[float]:
        """Return microseconds of a call for each path; they take turns.

        Raises:
            TritonError: A kernel cannot be compiled, or does not fit the GPU.

        """
        # Their workspaces must not be given away while graphs are replayed.
        calls = [self._calls(tiles) for tiles in paths]
        graphs = [graph_timing.capture(each) for each in calls]
        measured = graph_timing.microseconds(graphs, replays)
        return [time / len(self.routings) for time in measured]

    def time(self, tiles: Tiles, replays: int) -> float:
        """Return microseconds of a call; infinite if its kernels do not run."""
        try:
            return self.times([tiles], replays)[0]
        except TritonError:
            return float("inf")

    def difference(self, tiles: Tiles) -> str | None:
        """Return how the output is not that of the present tiles, or None if it is.

        Where both add in the same order, each bit counts.
        """
        if tiles not in self._differences:
            self._differences[tiles] = self._difference(tiles)
        return self._differences[tiles]

    def _difference(self, tiles: Tiles) -> str | None:
        expected, value = self._expected, self.output(tiles)
        order = candidates.order_of_sums
        if order(tiles.fit(self.problem.hidden)) == order(self.present):
            same = torch.equal(value, expected)
            return None if same else "not the same bits, of the same sums"
        error = worst_columns(value, expected.float())
        # NaN is no number below a limit.
        return None if error < NOISE else f"128 columns are {error:.1e} apart"

    def output(self, tiles: Tiles) -> torch.Tensor:
        """Return the outputs of some calls, one below the other."""
        found = []
        for call in self._calls(tiles)[: self.compared]:
            self.out.fill_(float("nan"))
            call()
            found.append(self.out.clone())
        return torch.cat(found)

    @cached_property
    def _expected(self) -> torch.Tensor:
        return self.output(self.present)

    def _calls(self, tiles: Tiles) -> list[partial]:
        plan = masked_moe.plan_for(self.problem, tiles.fit(self.problem.hidden))
        workspace = torch.empty(
            plan.workspace_bytes, dtype=torch.uint8, device=self.layer.device
        )
        copies = self.layer.copies
        return [
            partial(
                *(plan.run, self.out, self.x, copies[number % len(copies)]),
                *(routing, workspace),
            )
            for number, routing in enumerate(self.routings)
        ]
