# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Chooses tiles for a call of the masked kernels: a tuned file's, else a rule's.

The rule tells Hopper from all other GPUs.
"""

import math
from dataclasses import replace

from vllm.platforms import current_platform

from ..slices.shard import BlockShard
from .fp8_quant import BLOCK
from .tiles import PairTiles, SortedTiles, Tile, Tiles
from .tuned_tiles import tuned_tiles

# Tiles by pairs of an expert, below which they are taken. Stages are fewer off Hopper:
# sm_89 and sm_120 have 99 KiB of shared memory.
_HOPPER: tuple[tuple[float, Tiles], ...] = (
    (0.3, PairTiles(Tile(32, 4, 6, True), Tile(64, 4, 8, True), pdl=True)),
    (0.75, PairTiles(Tile(32, 4, 4, True), Tile(128, 4, 6, True), pdl=True)),
    (14, SortedTiles(16, Tile(64, 4, 3, True, 2), Tile(128, 4, 3, True), 2, pdl=True)),
    (32, SortedTiles(32, Tile(64, 4, 3, True), Tile(64, 4, 3, True), 4)),
    (512, SortedTiles(64, Tile(64, 4, 4), Tile(64, 4, 3), 2, specialized=True)),
    (
        math.inf,
        SortedTiles(64, Tile(64, 4, 3), Tile(64, 4, 3, True), specialized=True),
    ),
)
_OTHERS: tuple[tuple[float, Tiles], ...] = (
    (1, PairTiles(Tile(32, 4, 3), Tile(32, 4, 3))),
    (8, SortedTiles(16, Tile(32, 4, 3), Tile(32, 4, 3), 4)),
    (32, SortedTiles(32, Tile(32, 4, 3), Tile(32, 4, 3), 4)),
    (math.inf, SortedTiles(64, Tile(64, 4, 2), Tile(64, 4, 3), 2)),
)
# Programs of gate and up up to which two share a tile: about half the multiprocessors.
_MOST_SHARED = 64
# Halves of quant blocks that down holds, up to which its tiles are as in the tables.
_MOST_NARROW = 4
# Bytes of down in flight beside which shared memory holds all else, off Hopper.
_MOST_LOADED = 80 * 1024
# Tokens beyond which nothing is split along K.
MOST_SPLIT = 256


def tiles_for(
    num_tokens: int, top_k: int, num_experts: int, hidden: int, shard: BlockShard
) -> Tiles:
    """Return tuned tiles for the nearest number of tokens, else the rule's.

    Args:
        num_tokens: Tokens of the call.
        top_k: Experts of a token.
        num_experts: Experts of the rank.
        hidden: Hidden size.
        shard: The rank's columns.

    """
    tuned = tuned_tiles(num_experts, shard.size)
    hopper = current_platform.is_device_capability(90)
    if tuned:
        nearest = min(tuned, key=lambda tokens: abs(tokens - num_tokens))
        tiles = tuned[nearest]
    else:
        tiles = rule(num_tokens * top_k, num_experts, shard, hopper)
    if tiles.specialized and not hopper:
        tiles = replace(tiles, specialized=False)
    if isinstance(tiles, PairTiles) and num_tokens > MOST_SPLIT:
        tiles = replace(tiles, gate_up_splits=1)
    return tiles.fit(hidden)


def rule(num_pairs: int, num_experts: int, shard: BlockShard, hopper: bool) -> Tiles:
    """Return tiles by how many pairs an expert gets.

    Below one, experts are read about once without blocks of pairs. Further up a block
    should hold an expert's pairs, so that its weights are read once.
    """
    table = _HOPPER if hopper else _OTHERS
    tiles = next(tiles for below, tiles in table if num_pairs / num_experts < below)
    programs = num_pairs * tiles.gate_up.count(shard)
    if hopper and isinstance(tiles, PairTiles) and programs <= _MOST_SHARED:
        tiles = replace(tiles, gate_up_splits=2)
    halves = replace(tiles.down, block_n=BLOCK // 2).count(shard)
    return tiles if halves <= _MOST_NARROW else _widened(tiles, shard, hopper)


def _widened(tiles: Tiles, shard: BlockShard, hopper: bool) -> Tiles:
    """Make down take less at a time, where its rows are long."""
    down = replace(tiles.down, block_n=min(64, tiles.down.block_n))
    if not hopper:
        most = _MOST_LOADED // (down.block_n * shard.span)
        down = replace(down, num_stages=min(most, down.num_stages))
    tiles = replace(tiles, down=down)
    return replace(tiles, down_splits=4) if tiles.block_m == 16 else tiles
