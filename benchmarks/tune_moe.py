"""Tunes the masked kernels on this GPU and writes what was best as a config file.

    python -m benchmarks.tune_moe --experts 128 --top-k 8 --hidden 4096 \\
        --total 1536 --tp 8

A path starts with any tiles, and takes the best ones of gate and up, then those of
down, then programmatic dependent launch or not. What is timed is all of the path, in a
CUDA graph over eight routings in rotation.
"""

import argparse
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain, product
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from benchmarks.graph_timing import capture, microseconds
from benchmarks.quantized import BLOCK, FP8
from vllm_patch.fp8_tp_padding.kernels import masked_moe
from vllm_patch.fp8_tp_padding.kernels.tiles import PairTiles, SortedTiles, Tile, Tiles
from vllm_patch.fp8_tp_padding.kernels.tuned_tiles import CONFIGS, config_name
from vllm_patch.fp8_tp_padding.slices.shard import block_shard

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ROUTINGS = 8
ANY = Tile(64, 4, 3)
# Values of a field or two that are tried instead of a path's.
Choices = list[dict[str, object]]


def starts(pairs_per_expert: float) -> list[Tiles]:
    """Return paths, with any tiles, that can be best for so many pairs."""
    least_and_most = {16: (0.25, 24), 32: (4, 48), 64: (12, 1e9), 128: (48, 1e9)}
    found: list[Tiles] = [PairTiles(ANY, ANY)] if pairs_per_expert <= 4 else []
    for block_m, (least, most) in least_and_most.items():
        if least <= pairs_per_expert <= most:
            found.append(SortedTiles(block_m, ANY, ANY))
    return found


def steps(start: Tiles) -> list[Choices]:
    """Return what is chosen, one after the other."""
    gate_up: Choices = [{"gate_up": tile} for tile in gate_up_tiles(start)]
    down: Choices = [{"down": tile} for tile in down_tiles(start)]
    if isinstance(start, SortedTiles):
        splits = [{"down_splits": number} for number in (2, 4, 8)]
        down = [{**tile, **split} for tile, split in product(down, splits)]
    return [gate_up, down, [{"pdl": False}, {"pdl": True}]]


def gate_up_tiles(start: Tiles) -> list[Tile]:
    if isinstance(start, PairTiles):
        return [
            *tiles_of((16, 32), (4,), (3, 4), unrolls=(2, 4)),
            *tiles_of((16,), (1,), (4,), unrolls=(2,)),
            *tiles_of((64,), (4,), (3, 4, 5, 7), swap=True),
        ]
    if start.block_m < 64:
        return [
            *tiles_of((64,), (4,), (2, 3), swap=True, unrolls=(2,)),
            *tiles_of((64, 128), (4,), (3, 4), swap=True),
        ]
    return [
        *tiles_of((64,), (4, 8), (3, 4)),
        *tiles_of((128,), (8,), (3, 4)),
        *tiles_of((64,), (8,), (3,), unrolls=(2,)),
    ]


def down_tiles(start: Tiles) -> list[Tile]:
    if isinstance(start, PairTiles):
        return tiles_of((64, 128), (4,), (2, 3, 4, 5, 8), swap=True)
    if start.block_m < 64:
        return tiles_of((64, 128), (4,), (2, 3, 4), swap=True)
    return tiles_of((64, 128), (4,), (2, 3, 4)) + tiles_of((64, 128), (8,), (3,))


def tiles_of(
    widths: tuple[int, ...],
    warps: tuple[int, ...],
    stages: tuple[int, ...],
    swap: bool = False,
    unrolls: tuple[int, ...] = (1,),
) -> list[Tile]:
    return [
        Tile(*values) for values in product(widths, warps, stages, (swap,), unrolls)
    ]


class Layer:
    """One rank's experts on the GPU, with finite random contents."""

    def __init__(self, sizes: argparse.Namespace):
        self.sizes = sizes
        self.shard = block_shard(sizes.total, BLOCK, sizes.rank, sizes.tp)
        size, blocks = self.shard.size, self.shard.num_blocks
        experts, hidden = sizes.experts, sizes.hidden
        self.weights = masked_moe.Weights(
            torch.randn(experts, 2 * size, hidden, dtype=torch.bfloat16).to(FP8),
            torch.randn(experts, hidden, size, dtype=torch.bfloat16).to(FP8),
            torch.rand(experts, 2 * blocks, hidden // BLOCK) * 0.01,
            torch.rand(experts, hidden // BLOCK, blocks) * 0.01,
        )


class Batch:
    """Calls for a number of tokens, one for each routing."""

    def __init__(self, layer: Layer, tokens: int):
        sizes, self.layer = layer.sizes, layer
        self.problem = masked_moe.Problem(
            *(tokens, sizes.top_k, sizes.hidden, sizes.experts, layer.shard),
            torch.bfloat16,
        )
        self.x = torch.randn(tokens, sizes.hidden, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.x)
        self.routings = []
        for _ in range(ROUTINGS):
            logits = torch.rand(tokens, sizes.experts)
            weights, ids = logits.softmax(-1).topk(sizes.top_k)
            self.routings.append(masked_moe.Routing(weights, ids.to(torch.int32)))

    def time(self, tiles: Tiles) -> float:
        """Microseconds of a call; infinite where a kernel does not fit the GPU."""
        plan = masked_moe.plan_for(self.problem, tiles.fit(self.problem.hidden))
        workspace = torch.zeros(plan.workspace_bytes, dtype=torch.uint8)
        tensors = self.out, self.x, self.layer.weights

        def run():
            for routing in self.routings:
                plan.run(*tensors, routing, workspace)

        try:
            return microseconds([capture([run])])[0] / ROUTINGS
        except triton.runtime.errors.OutOfResources:
            return float("inf")


def tune(layer: Layer, tokens: int) -> tuple[Tiles, float]:
    """Return the fastest path for a number of tokens and its microseconds."""
    batch, found = Batch(layer, tokens), []
    for tiles in starts(tokens * layer.sizes.top_k / layer.sizes.experts):
        for choices in steps(tiles):
            candidates = [replace(tiles, **choice) for choice in choices]
            tiles = min(candidates, key=batch.time)
        found.append((batch.time(tiles), tiles))
    time, tiles = min(found, key=lambda pair: pair[0])
    return tiles, time


def all_paths() -> Iterator[Tiles]:
    """Yield paths that hold every candidate."""
    for start in dict.fromkeys(starts(0.1) + starts(6) + starts(100)):
        for choice in chain(*steps(start)):
            yield replace(start, **choice)


def compile_some(work: tuple[argparse.Namespace, int, int]) -> None:
    """Compile every ``step``-th candidate, for Triton's cache on disk."""
    sizes, first, step = work
    torch.set_default_device("cuda")
    batch = Batch(Layer(sizes), 16)
    for tiles in list(all_paths())[first::step]:
        batch.time(tiles)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("experts", "top-k", "hidden", "total", "tp"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument(
        "--out", type=Path, default=CONFIGS, help="folder of config files"
    )
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA GPU")
    return parser.parse_args()


def main() -> None:
    sizes = arguments()
    processes = min(14, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        parts = [(sizes, first, processes) for first in range(processes)]
        done = pool.imap_unordered(compile_some, parts)
        deque(tqdm(done, "compiling", total=processes, disable=None), maxlen=0)
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    layer = Layer(sizes)
    config: dict[str, object] = {"triton_version": triton.__version__}
    for tokens in tqdm(sizes.tokens, "tuning", disable=None):
        tiles, time = tune(layer, tokens)
        config[str(tokens)] = asdict(tiles)
        with tqdm.external_write_mode():
            print(f"{tokens:6} tokens {time:8.1f} us  {tiles}", flush=True)
    sizes.out.mkdir(exist_ok=True)
    file = sizes.out / config_name(sizes.experts, layer.shard.size)
    # A line for each number of tokens.
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in config.items())
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(file)


if __name__ == "__main__":
    main()
