# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which tiles the masked kernels get, and tuned files that are wrong."""

import json

import pytest

from vllm.model_executor.layers.quantization.fp8_tp_padding.shard import block_shard

TILE = {"block_n": 64, "num_warps": 4, "num_stages": 3}
PAIRS = {"sort": False, "block_m": 16, "gate_up": TILE, "down": TILE}
SORTED = {**PAIRS, "sort": True}


@pytest.fixture
def tiles():
    from vllm.model_executor.layers.quantization.fp8_tp_padding import tiles

    tiles.tiles_for.cache_clear()
    yield tiles
    tiles.tiles_for.cache_clear()


@pytest.fixture
def read(tiles, tmp_path):
    """Write a tuned file and read it."""

    def read(config: dict):
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps(config))
        return tiles.read_config(path)

    return read


def test_tuned_files_can_be_read(tiles):
    files = list(tiles.CONFIGS.glob("*.json"))
    assert files and all(tiles.read_config(file) for file in files)


def test_entries_come_in_order(read):
    tuned = read({"triton_version": "3.6.0", "64": SORTED, "8": PAIRS})
    assert [(tokens, tiles.sort) for tokens, tiles in tuned.items()] == [
        (8, False),
        (64, True),
    ]


def test_sort_does_not_go_back(read):
    """Whatever the order of the entries, and as numbers: 16 is more than 8."""
    message = r"tuned\.json: sort is True for 8 tokens and False for 16\. It must"
    with pytest.raises(ValueError, match=message):
        read({"16": PAIRS, "8": SORTED, "4": PAIRS})


def test_quantizing_earlier_does_not_begin_later(read):
    """It makes the intermediate smaller than that of a smaller call."""
    entry = {**SORTED, "gate_up": {**TILE, "block_n": 128}}
    message = r"quantize_in_gate_up is False for 8 tokens and True for 16\. It must"
    with pytest.raises(ValueError, match=message):
        read({"8": entry, "16": {**entry, "quantize_in_gate_up": True}})


@pytest.mark.parametrize("config", [{}, {"triton_version": "3.6.0"}, [], 3])
def test_files_without_entries(read, config):
    with pytest.raises(ValueError, match=r"tuned\.json: no tiles"):
        read(config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"8": {**PAIRS, "down": {**TILE, "num_warps": 3}}}, "num_warps = 3"),
        ({"8": {**PAIRS, "down": {**TILE, "num_stages": 0}}}, "num_stages = 0"),
        ({"8": {**PAIRS, "down": {**TILE, "unroll": 0}}}, "unroll = 0"),
        ({"8": {**PAIRS, "block_m": 8}}, "block_m = 8"),
        ({"8": {**PAIRS, "block_m": 24}}, "block_m = 24"),
        ({"8": {**PAIRS, "down_splits": 0}}, "down_splits = 0"),
        ({"8": {**PAIRS, "sort": "no"}}, "sort = 'no'"),
        ({"-1": PAIRS}, "tokens = -1"),
        ({"8": {**PAIRS, "block_k": 64}}, "block_k"),
        ({"8": {**PAIRS, "down": {**TILE, "block_k": 64}}}, "block_k"),
        ({"8": {"sort": True, "block_m": 16, "down": TILE}}, "gate_up"),
        ({"8": {**PAIRS, "down": {**TILE, "block_n": 48}}}, "block_n = 48"),
        ({"author": "me"}, "'author' must be a number of tokens"),
    ],
)
def test_fields_that_are_wrong(read, config, named):
    with pytest.raises(ValueError, match=rf"tuned\.json: .*{named}"):
        read(config)


def test_the_nearest_number_of_tokens_is_taken(tiles, read, monkeypatch):
    tuned = read({"8": {**PAIRS, "down_splits": 4}, "64": SORTED})
    monkeypatch.setattr(tiles, "_tuned", lambda experts, size: tuned)
    shard = block_shard(1536, 128, 1, 8)
    chosen = [tiles.tiles_for(n, 8, 128, 256, shard) for n in (1, 35, 37, 4096)]
    assert [tiles.sort for tiles in chosen] == [False, False, True, True]
    # 256 is two blocks: they cannot be split in four.
    assert chosen[0].down_splits == 2
