# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Chooses tiles for a call of the masked kernels: a tuned file's, else a rule's.

The rule tells Hopper from all other GPUs.
"""

from dataclasses import replace

from vllm.platforms import current_platform

from ..slices.shard import BlockShard
from .tiles import PairTiles, SortedTiles, Tile, Tiles
from .tuned_tiles import tuned_tiles

# Tokens beyond which nothing is split along K: ``workspace_bytes`` looks no further.
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
    if tuned:
        nearest = min(tuned, key=lambda tokens: abs(tokens - num_tokens))
        tiles = tuned[nearest]
    else:
        hopper = current_platform.is_device_capability(90)
        tiles = rule(num_tokens * top_k / num_experts, hopper)
    if isinstance(tiles, PairTiles) and num_tokens > MOST_SPLIT:
        tiles = replace(tiles, gate_up_splits=1)
    return tiles.fit(hidden)


def rule(pairs_per_expert: float, hopper: bool) -> Tiles:
    """Return tiles by how many pairs an expert gets.

    Below one, experts are read about once without sorting. Further up a block
    should hold an expert's pairs, so that its weights are read once.
    """
    if pairs_per_expert < 0.125 and not hopper:
        return PairTiles(Tile(32, 4, 3), _narrow(hopper, 5))
    if pairs_per_expert < 0.5 and hopper:
        splits = 4 if pairs_per_expert < 0.125 else 2
        gate_up = Tile(32, 4, 4, swap=True)
        return PairTiles(gate_up, _narrow(hopper, 8), splits, pdl=True)
    if pairs_per_expert < 1:
        return PairTiles(_narrow(hopper, 4), _narrow(hopper, 4))
    if pairs_per_expert < 8:
        return SortedTiles(16, _narrow(hopper, 4), _narrow(hopper, 3), 4)
    if pairs_per_expert < 32:
        return SortedTiles(32, _narrow(hopper, 3), _narrow(hopper, 3), 4)
    if pairs_per_expert < 512 or not hopper:
        return SortedTiles(64, Tile(64, 4, 4 if hopper else 2), Tile(64, 4, 3), 2)
    return SortedTiles(64, Tile(64, 4, 3), Tile(64, 4, 3, swap=True))


def _narrow(hopper: bool, num_stages: int) -> Tile:
    """For blocks of few pairs.

    Stages are fewer off Hopper: sm_89 and sm_120 have 99 KiB of shared memory.
    """
    if hopper:
        return Tile(64, 4, num_stages, swap=True)
    return Tile(32, 4, min(num_stages, 3))
