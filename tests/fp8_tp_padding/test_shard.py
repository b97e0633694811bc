# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The geometry, against an oracle that looks at one element at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.model_executor.layers.quantization.fp8_tp_padding.slices.shard import (
    block_shard,
)


@st.composite
def ranks(draw):
    block = draw(st.integers(1, 300))
    tp_size = draw(st.integers(1, 64))
    total = tp_size * draw(st.integers(1, 2000))
    return total, block, draw(st.integers(0, tp_size - 1)), tp_size


@settings(deadline=None)
@given(ranks())
def test_every_element_keeps_its_block_and_its_place_in_it(rank):
    total, block, tp_rank, tp_size = rank
    shard = block_shard(total, block, tp_rank, tp_size)
    mine = range(total)[tp_rank * total // tp_size : (tp_rank + 1) * total // tp_size]
    assert (shard.start, shard.size) == (mine.start, len(mine))
    for local, element in ((0, mine[0]), (len(mine) - 1, mine[-1])):
        place = shard.lead + local
        assert place % block == element % block
        assert shard.first_block + place // block == element // block
    assert {element // block for element in mine} == set(
        range(shard.first_block, shard.first_block + shard.num_blocks)
    )
    assert shard.span == shard.num_blocks * block


@settings(deadline=None)
@given(ranks())
def test_no_block_is_wasted(rank):
    shard = block_shard(*rank)
    block = rank[1]
    assert shard.lead < block
    assert shard.span - shard.lead - shard.size < block


@pytest.mark.parametrize(
    ("total", "tp_size", "spans"),
    [
        (1536, 8, {256}),  # Qwen3-235B: odd ranks start in the middle of a block
        (2560, 8, {384}),  # Qwen3-Coder-480B
        (512, 8, {128}),  # Qwen3-Next: two ranks to a block
        (640, 8, {128, 256}),  # some ranks straddle a boundary
        (1408, 8, {256, 384}),  # GLM-4.5-Air: some straddle two
        (1536, 4, {384}),  # aligned
    ],
)
def test_spans_of_known_models(total, tp_size, spans):
    shards = [block_shard(total, 128, rank, tp_size) for rank in range(tp_size)]
    assert {shard.span for shard in shards} == spans


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 128, 0, 8), "total = 0 must be positive"),
        ((1536, 0, 0, 8), "block = 0 must be positive"),
        ((1536, -128, 0, 8), "block = -128 must be positive"),
        ((1536, 128, 0, 0), "tp_size = 0 must be positive"),
        ((1536, 128, 8, 8), "tp_rank = 8 is not a rank of tp_size = 8"),
        ((1536, 128, -1, 8), "tp_rank = -1 is not a rank of tp_size = 8"),
        ((1536, 128, 0, 7), "total = 1536 is not divisible by tp_size = 7"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_shard(*arguments)
