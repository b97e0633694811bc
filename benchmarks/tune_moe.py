"""Tunes the masked kernels on this GPU and writes what was best as a config file.

    python -m benchmarks.tune_moe --experts 128 --top-k 8 --hidden 4096 \\
        --total 1536 --tp 8

The kernels of a path are timed one by one, in CUDA graphs over eight routings in
rotation; the paths made of the fastest ones are then timed as a whole, with and
without programmatic dependent launch. Takes about a minute on 16 cores.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator

import torch
import triton

from benchmarks.graph_timing import capture, microseconds
from vllm_patch.fp8_tp_padding import masked_moe
from vllm_patch.fp8_tp_padding.shard import block_shard
from vllm_patch.fp8_tp_padding.tiles import CONFIGS, Tile, Tiles

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ROUTINGS = 8
FP8 = torch.float8_e4m3fn
ANY = Tile(64, 4, 3)


def tiles_of(
    widths: tuple[int, ...],
    warps: tuple[int, ...],
    stages: tuple[int, ...],
    swap: bool = False,
    unrolls: tuple[int, ...] = (1,),
) -> list[Tile]:
    grid = itertools.product(widths, warps, stages, (swap,), unrolls)
    return [Tile(*values) for values in grid]


def gate_up_candidates(sort: bool, block_m: int) -> list[Tile]:
    if not sort:
        return [
            *tiles_of((16, 32), (4,), (3, 4), unrolls=(2, 4)),
            *tiles_of((16,), (1,), (4,), unrolls=(2,)),
            *tiles_of((64,), (4,), (3, 4, 5, 7), swap=True),
        ]
    if block_m < 64:
        return [
            *tiles_of((64,), (4,), (2, 3), swap=True, unrolls=(2,)),
            *tiles_of((64, 128), (4,), (3, 4), swap=True),
        ]
    return [
        *tiles_of((64,), (4, 8), (3, 4)),
        *tiles_of((128,), (8,), (3, 4)),
        *tiles_of((64,), (8,), (3,), unrolls=(2,)),
    ]


def down_candidates(sort: bool, block_m: int) -> list[tuple[Tile, int]]:
    if not sort:
        tiles = tiles_of((64, 128), (4,), (2, 3, 4, 5, 8), swap=True)
        return [(tile, 1) for tile in tiles]
    swap = block_m < 64
    tiles = tiles_of((64, 128), (4,), (2, 3, 4), swap)
    if not swap:
        tiles += tiles_of((64, 128), (8,), (3,))
    return list(itertools.product(tiles, (2, 4, 8)))


def shapes(pairs_per_expert: float) -> list[tuple[bool, int]]:
    """Sorted or not, and block sizes, that can be best for so many pairs."""
    found = []
    if pairs_per_expert <= 4:
        found.append((False, 16))
    if 0.25 <= pairs_per_expert <= 24:
        found.append((True, 16))
    if 4 <= pairs_per_expert <= 48:
        found.append((True, 32))
    if pairs_per_expert >= 12:
        found.append((True, 64))
    if pairs_per_expert >= 48:
        found.append((True, 128))
    return found


@dataclasses.dataclass
class Layer:
    """One rank's experts on the GPU, with finite random contents."""

    arguments: argparse.Namespace

    def __post_init__(self):
        a = self.arguments
        self.shard = block_shard(a.total, 128, a.rank, a.tp)
        size, blocks = self.shard.size, self.shard.num_blocks
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*shape):
            return torch.randn(
                *shape, generator=generator, device="cuda", dtype=torch.bfloat16
            )

        def scales(*shape):
            return torch.rand(*shape, generator=generator, device="cuda") * 0.01

        self.weights = masked_moe.Weights(
            random(a.experts, 2 * size, a.hidden).to(FP8),
            random(a.experts, a.hidden, size).to(FP8),
            scales(a.experts, 2 * blocks, a.hidden // 128),
            scales(a.experts, a.hidden // 128, blocks),
        )


class Batch:
    """Calls for a number of tokens, one for each routing."""

    def __init__(self, layer: Layer, num_tokens: int):
        a = layer.arguments
        self.layer = layer
        generator = torch.Generator("cuda").manual_seed(num_tokens)
        self.x = torch.randn(
            *(num_tokens, a.hidden),
            generator=generator,
            device="cuda",
            dtype=torch.bfloat16,
        )
        self.out = torch.empty_like(self.x)
        self.routings = []
        for _ in range(ROUTINGS):
            logits = torch.rand(
                num_tokens, a.experts, generator=generator, device="cuda"
            )
            weights, ids = logits.softmax(-1).topk(a.top_k)
            routing = masked_moe.Routing(weights, ids.to(torch.int32))
            self.routings.append(routing)

    def problem(self, tiles: Tiles) -> masked_moe.Problem:
        a = self.layer.arguments
        tokens = self.x.shape[0]
        return masked_moe.Problem(
            *(tokens, a.top_k, a.hidden, a.experts, self.layer.shard),
            *(torch.bfloat16, tiles.fit(a.hidden)),
        )

    def calls(self, tiles: Tiles) -> list[masked_moe._Call]:
        """Calls that have run once, so that every intermediate is there."""
        problem = self.problem(tiles)
        calls = []
        for routing in self.routings:
            workspace = torch.zeros(
                problem.workspace_bytes, dtype=torch.uint8, device="cuda"
            )
            views = problem.carve(workspace)
            call = masked_moe._Call(problem, views, self.layer.weights, routing)
            call.prepare(self.x)
            if tiles.sort:
                call.sort()
            views["h"].copy_(torch.randn_like(views["h"].float()))
            calls.append(call)
        return calls

    def run(self, tiles: Tiles) -> list[Callable[[], None]]:
        problem = self.problem(tiles)
        workspace = torch.zeros(
            problem.workspace_bytes, dtype=torch.uint8, device="cuda"
        )
        return [
            lambda routing=routing: masked_moe.masked_moe(
                self.out, self.x, self.layer.weights, routing, problem, workspace
            )
            for routing in self.routings
        ]


def timed(calls: list[Callable[[], None]]) -> float:
    """Microseconds of one call; infinite where a kernel does not fit the GPU."""
    try:
        return microseconds([capture(calls)])[0] / len(calls)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def best_gate_up(batch: Batch, sort: bool, block_m: int) -> Tile:
    calls = batch.calls(Tiles(sort, block_m, ANY, ANY))

    def time(tile: Tile) -> float:
        tiles = Tiles(sort, block_m, tile, ANY)
        problem = batch.problem(tiles)
        return timed([dataclasses.replace(c, problem=problem).gate_up for c in calls])

    return min(gate_up_candidates(sort, block_m), key=time)


def best_down(batch: Batch, sort: bool, block_m: int) -> tuple[Tile, int]:
    calls = batch.calls(Tiles(sort, block_m, ANY, ANY))

    def time(candidate: tuple[Tile, int]) -> float:
        problem = batch.problem(Tiles(sort, block_m, ANY, *candidate))
        tried = [dataclasses.replace(call, problem=problem) for call in calls]
        if sort:
            return timed([call.down for call in tried])
        return timed([lambda call=call: call.down_and_sum(batch.out) for call in tried])

    return min(down_candidates(sort, block_m), key=time)


def tune(layer: Layer, num_tokens: int) -> tuple[Tiles, float]:
    """Return the fastest path for ``num_tokens`` and its microseconds."""
    a = layer.arguments
    batch = Batch(layer, num_tokens)
    found = []
    for sort, block_m in shapes(num_tokens * a.top_k / a.experts):
        gate_up = best_gate_up(batch, sort, block_m)
        down, splits = best_down(batch, sort, block_m)
        for pdl in (False, True):
            tiles = Tiles(sort, block_m, gate_up, down, splits, pdl=pdl)
            found.append((timed(batch.run(tiles)), tiles))
    microseconds_, tiles = min(found, key=lambda pair: pair[0])
    return tiles, microseconds_


def all_paths() -> Iterator[Tiles]:
    """Yield paths that hold every candidate."""
    for sort, block_m in shapes(0.1) + shapes(6) + shapes(100):
        for tile in gate_up_candidates(sort, block_m):
            yield Tiles(sort, block_m, tile, ANY)
        for tile, splits in down_candidates(sort, block_m):
            yield Tiles(sort, block_m, ANY, tile, splits)


def compile_some(work: tuple[argparse.Namespace, int, int]) -> None:
    """Compile every ``step``-th candidate, for Triton's cache on disk."""
    arguments, first, step = work
    batch = Batch(Layer(arguments), 16)
    for tiles in list(all_paths())[first::step]:
        try:
            for call in batch.calls(tiles)[:1]:
                call.gate_up()
                call.down() if tiles.sort else call.down_and_sum(batch.out)
        except triton.runtime.errors.OutOfResources:
            continue
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("experts", "top-k", "hidden", "total", "tp"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", default=str(CONFIGS), help="folder of config files")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA GPU")

    step = min(14, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(step) as pool:
        pool.map(compile_some, [(arguments, first, step) for first in range(step)])
    layer = Layer(arguments)
    config: dict[str, object] = {"triton_version": triton.__version__}
    for num_tokens in arguments.tokens:
        tiles, time = tune(layer, num_tokens)
        config[str(num_tokens)] = dataclasses.asdict(tiles)
        print(f"{num_tokens:6} tokens {time:8.1f} us  {tiles}", flush=True)

    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    size = arguments.total // arguments.tp
    name = get_config_file_name(arguments.experts, size, "fp8_w8a8", [128, 128])
    os.makedirs(arguments.out, exist_ok=True)
    with open(os.path.join(arguments.out, name), "w") as file:
        json.dump(config, file, indent=4)
        file.write("\n")
    print(file.name)


if __name__ == "__main__":
    main()
