# SPDX-License-Identifier: Apache-2.0
"""Which tiles are tried: all that ``vllm-patch tune`` knows of what may be fast.

A path starts with any tiles, and takes the best ones of gate and up, then those of
down, then how many programs share down's columns, then dependent launch or not. What
cannot be fast by a count of programs, bytes or launches is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from vllm_patch.fp8_tp_padding.kernels.fp8_quant import BLOCK
from vllm_patch.fp8_tp_padding.kernels.masked_moe import (
    LEAST_ROWS,
    Problem,
    can_specialize,
)
from vllm_patch.fp8_tp_padding.kernels.tiles import (
    SPECIALIZED_M,
    PairTiles,
    SortedTiles,
    Tile,
    Tiles,
)
from vllm_patch.fp8_tp_padding.kernels.warp_specialization import TILE

ANY = Tile(64, 4, 3)
# Pairs of an expert for which a block of so many rows is tried: with fewer most of it
# is padding, with more each expert's weights are read several times.
PAIRS = {16: (0.25, 16), 32: (6, 40), 64: (20, float("inf"))}
# From so many on, warps that specialize are tried: they multiply twice as many.
LEAST_SPECIALIZED = 32
# Above, what takes pairs or tokens alone reads each expert that often.
MOST_UNSORTED = 4
# Programs for each multiprocessor, beyond which down gains nothing by more, of gate and
# up, where tiles of 64 columns are enough, and where splits along K are too many.
DOWN_PROGRAMS = 1.3, 10.0
GATE_UP_PROGRAMS = 2
SPLIT_PROGRAMS = 4
# What dependent launch saves at most, for each launch, and how much shows.
LAUNCH_US, LAUNCHES, SHOWS = 1.0, 5, 0.02


@dataclass(frozen=True)
class Gpu:
    """What tiles depend on.

    Attributes:
        multiprocessors: How many there are.
        shared_memory: Bytes that a program may have.
        launches_dependently: Whether a kernel may start while one before it ends.
        is_hopper: Whether its warps may specialize.

    """

    multiprocessors: int
    shared_memory: int
    launches_dependently: bool
    is_hopper: bool


@dataclass(frozen=True)
class Path:
    """A path on its way to the best tiles.

    Attributes:
        problem: Sizes of the call.
        gpu: Where it runs.
        blocks: Blocks of pairs of a typical routing.
        tiles: The best so far.
        time: Their microseconds.

    """

    problem: Problem
    gpu: Gpu
    blocks: int
    tiles: Tiles
    time: float = float("inf")


def starts(problem: Problem, gpu: Gpu) -> list[Tiles]:
    """Return paths, with any tiles, that can be best for so many pairs."""
    each = problem.num_pairs / problem.num_experts
    found: list[Tiles] = [PairTiles(ANY, ANY)] if each <= MOST_UNSORTED else []
    for block_m, (least, most) in PAIRS.items():
        if least <= each <= most:
            found.append(SortedTiles(block_m, ANY, ANY, down_splits=2))
    # Where launches show, weights that are loaded early decide which tiles are best.
    dependent = gpu.launches_dependently
    found = [replace(tiles, pdl=dependent and tiles.block_m < 64) for tiles in found]
    if gpu.is_hopper and each >= LEAST_SPECIALIZED and can_specialize(problem):
        # The rest of gate_up's tile is for where they do not run.
        tiles = SortedTiles(SPECIALIZED_M, Tile(64, 4, 4), ANY, 2, specialized=True)
        found.append(tiles)
    return found


def gate_up(path: Path) -> list[Tiles]:
    if path.tiles.specialized:
        return []
    block_m = path.tiles.block_m or LEAST_ROWS
    return [
        replace(path.tiles, gate_up=tile, **splits).fit(path.problem.hidden)
        for tile in _gate_up_tiles(path)
        # Loads of activations, gate and up that are in flight.
        if tile.num_stages * tile.unroll * (block_m + 2 * tile.block_n) * BLOCK
        <= path.gpu.shared_memory
        for splits in _gate_up_splits(path, tile)
    ]


def _gate_up_splits(path: Path, tile: Tile) -> list[dict[str, int]]:
    if isinstance(path.tiles, SortedTiles):
        return [{}]
    programs = path.blocks * tile.count(path.problem.shard)
    most = SPLIT_PROGRAMS * path.gpu.multiprocessors
    return [
        {"gate_up_splits": splits}
        for splits in (1, 2, 4, 8)
        if splits == 1 or programs * splits <= most
    ]


def _gate_up_tiles(path: Path) -> list[Tile]:
    if isinstance(path.tiles, PairTiles):
        swapped = _tiles((32, 64), (4,), (3, 4, 6), swap=True)
        programs = path.blocks * ANY.count(path.problem.shard)
        if programs > GATE_UP_PROGRAMS * path.gpu.multiprocessors:
            return swapped
        return [*swapped, *_tiles((16, 32), (4,), (3, 4), unrolls=(4,))]
    if path.tiles.block_m < 64:
        return [
            *_tiles((64,), (4,), (2, 3), swap=True, unrolls=(2,)),
            *_tiles((64,), (4,), (2, 3, 4), swap=True),
        ]
    return _tiles((64,), (4, 8), (3, 4))


def down(path: Path) -> list[Tiles]:
    if isinstance(path.tiles, PairTiles):
        tiles = _tiles((64, 128), (4,), (2, 3, 4, 6, 8), swap=True)
    elif path.tiles.block_m < 64:
        tiles = _tiles((64, 128), (4,), (2, 3, 4), swap=True)
    else:
        tiles = _tiles((64, 128), (4,), (3, 4))
        tiles += _tiles((64,), (4, 8), (3, 4), swap=True)
    columns = path.problem.shard.size
    return [
        replace(path.tiles, down=tile)
        for tile in tiles
        if tile.num_stages * tile.block_n * columns <= path.gpu.shared_memory
    ]


def down_splits(path: Path) -> list[Tiles]:
    if isinstance(path.tiles, PairTiles):
        return []
    least, most = (each * path.gpu.multiprocessors for each in DOWN_PROGRAMS)
    return [
        replace(path.tiles, down_splits=splits).fit(path.problem.hidden)
        for splits in (1, 2, 4, 8, 16)
        if least <= path.blocks * splits <= most
    ]


def dependent_launch(path: Path) -> list[Tiles]:
    shows = path.time * SHOWS <= LAUNCHES * LAUNCH_US
    if not path.gpu.launches_dependently or not shows or path.tiles.specialized:
        return []
    return [replace(path.tiles, pdl=not path.tiles.pdl)]


# What is chosen, one after the other.
STEPS: dict[str, Callable[[Path], list[Tiles]]] = {
    "gate and up": gate_up,
    "down": down,
    "down's splits": down_splits,
    "dependent launch": dependent_launch,
}


def order_of_sums(tiles: Tiles) -> Tiles:
    """Return what is equal for tiles that add in the same order.

    Loads in flight, programs that share columns, other pairs of a block, who loads and
    who multiplies, and when a kernel starts change none.
    """
    changes: dict[str, object] = {
        "gate_up": replace(tiles.gate_up, num_stages=1),
        "down": replace(tiles.down, num_stages=1),
        "pdl": False,
    }
    if isinstance(tiles, SortedTiles):
        changes["down_splits"] = 1
        changes["specialized"] = False
        if tiles.specialized:
            changes["gate_up"] = replace(TILE, num_stages=1)
    return replace(tiles, **changes)


def _tiles(
    widths: tuple[int, ...],
    warps: tuple[int, ...],
    stages: tuple[int, ...],
    swap: bool = False,
    unrolls: tuple[int, ...] = (1,),
) -> list[Tile]:
    return [
        Tile(*values) for values in product(widths, warps, stages, (swap,), unrolls)
    ]
