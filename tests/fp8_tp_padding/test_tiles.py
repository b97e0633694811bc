# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which tuned tiles a call gets, and tuned files that are wrong."""

import json

import pytest

from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels import (
    tile_choice,
    tuned_tiles,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels.tiles import (
    PairTiles,
    SortedTiles,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.slices.shard import (
    block_shard,
)

TILE = {"block_n": 64, "num_warps": 4, "num_stages": 3}
VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
PAIRS = {"gate_up": TILE, "down": TILE}
SORTED = {**PAIRS, "block_m": 16}


@pytest.fixture
def read(tmp_path):
    """Write a tuned file and read it."""

    def read(config: dict):
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps(config))
        return tuned_tiles.read_config(path)

    return read


def test_the_tuned_file_is_found(monkeypatch):
    """In the plugin's folder or, in a vLLM tree, among those of vLLM's kernels."""
    name = "E={},N={},device_name=NVIDIA_H200,dtype={},block_shape=[128,128].json"
    monkeypatch.setattr(
        tuned_tiles, "get_config_file_name", lambda *sizes: name.format(*sizes)
    )
    tuned_tiles.tuned_tiles.cache_clear()
    tuned = tuned_tiles.tuned_tiles(128, 192)
    tuned_tiles.tuned_tiles.cache_clear()
    assert isinstance(tuned[1], PairTiles) and isinstance(tuned[4096], SortedTiles)


def test_entries_come_in_order(read):
    tuned = read({"triton_version": "3.6.0", "64": SORTED, "8": PAIRS})
    assert [*tuned] == [8, 64]
    assert isinstance(tuned[8], PairTiles) and isinstance(tuned[64], SortedTiles)


@pytest.mark.parametrize("block_m", [32, 0])
def test_blocks_do_not_shrink(read, block_m):
    """Whatever the order of the entries, and as numbers: 16 is more than 8."""
    more = {**SORTED, "block_m": block_m} if block_m else PAIRS
    message = (
        rf"blocks of 64 for 8 tokens and of {block_m} for 16 \(0: not sorted; twice "
    )
    with pytest.raises(ValueError, match=message):
        read({"16": more, "8": {**SORTED, "block_m": 64}, "4": PAIRS})


def test_groups_of_blocks_do_not_shrink(read):
    """Warps that specialize take two blocks, which needs more of the workspace."""
    plain = {**SORTED, "block_m": 64}
    specialized = {**plain, "specialized": True}
    tuned = read({"8": plain, "16": specialized})
    assert [tiles.specialized for tiles in tuned.values()] == [False, True]
    with pytest.raises(ValueError, match="blocks of 128 for 8 tokens and of 64 for 16"):
        read({"8": specialized, "16": plain})


@pytest.mark.parametrize("config", [{}, {"triton_version": "3.6.0"}, [], 3])
def test_files_without_entries(read, config):
    with pytest.raises(ValueError, match=r"tuned\.json: no tiles"):
        read(config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"8": {**PAIRS, "down": {**TILE, "num_warps": 3}}}, "num_warps = 3"),
        ({"8": {**PAIRS, "down": {**TILE, "num_stages": 0}}}, "num_stages = 0"),
        ({"8": {**PAIRS, "down": {**TILE, "num_stages": 300}}}, "num_stages = 300"),
        ({"8": {**PAIRS, "down": {**TILE, "block_n": 64.0}}}, "block_n = 64.0"),
        ({"8": {**PAIRS, "down": {**TILE, "unroll": 0}}}, "unroll = 0"),
        ({"8": {**SORTED, "block_m": 8}}, "block_m = 8"),
        ({"8": {**SORTED, "block_m": 24}}, "block_m = 24"),
        ({"8": {**SORTED, "down_splits": 0}}, "down_splits = 0"),
        ({"8": {**PAIRS, "down_splits": 2}}, "down_splits"),
        ({"8": {**PAIRS, "pdl": "no"}}, "pdl = 'no'"),
        ({"8": {**PAIRS, "specialized": True}}, "specialized"),
        ({"8": {**SORTED, "specialized": True}}, "blocks of 64 pairs"),
        ({"8": {**SORTED, "specialized": "no"}}, "specialized = 'no'"),
        ({"8": {**PAIRS, "down": {**TILE, "swap": 1}}}, "swap = 1"),
        ({"-1": PAIRS}, "tokens = -1"),
        ({"8": {**PAIRS, "block_k": 64}}, "block_k"),
        ({"8": {**PAIRS, "down": {**TILE, "block_k": 64}}}, "block_k"),
        ({"8": {"block_m": 16, "down": TILE}}, "gate_up"),
        ({"8": {**PAIRS, "down": {**TILE, "block_n": 48}}}, "block_n = 48"),
        ({"author": "me"}, "'author' must be a number of tokens"),
    ],
)
def test_fields_that_are_wrong(read, config, named):
    with pytest.raises(ValueError, match=rf"tuned\.json: .*{named}"):
        read(config)


def test_the_nearest_number_of_tokens_is_taken(read, monkeypatch):
    tuned = read({"8": PAIRS, "64": {**SORTED, "down_splits": 4}})
    monkeypatch.setattr(tile_choice, "tuned_tiles", lambda experts, size: tuned)
    shard = block_shard(1536, 128, 1, 8)
    chosen = [tile_choice.tiles_for(n, 8, 128, 256, shard) for n in (1, 35, 37, 4096)]
    assert [type(tiles) for tiles in chosen] == 2 * [PairTiles] + 2 * [SortedTiles]
    # 256 is two blocks: they cannot be split in four.
    assert chosen[2].down_splits == 2


# Qwen3-235B and Qwen3-Coder-480B at TP 8: two quant blocks and three; and four, which
# down loads as a whole.
QWEN, CODER = (block_shard(total, 128, 1, 8) for total in (1536, 2560))
WIDEST = block_shard(864, 128, 1, 2)
EXPERTS = 1000


def rule(each: float, shard=QWEN, hopper=True):
    """What ``EXPERTS`` with so many pairs each get."""
    return tile_choice.rule(round(each * EXPERTS), EXPERTS, shard, hopper)


@pytest.mark.parametrize(
    ("below", "before", "after"),
    [
        (0.3, (0, 64), (0, 128)),
        (0.75, (0, 128), (16, 128)),
        (14, (16, 128), (32, 64)),
        (32, (32, 64), (128, 64)),
        (512, (128, 64), (128, 64)),
    ],
)
def test_the_rule_goes_by_pairs_of_an_expert(below, before, after):
    """Blocks and down's columns, at each step up to the next."""
    found = rule(below - 1 / EXPERTS), rule(below)
    assert [(tiles.group_m, tiles.down.block_n) for tiles in found] == [before, after]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("total", "most"),
    [
        (1536, 10),  # Six tiles of 32 columns that hold real ones.
        (1408, 10),  # 176 columns from 48, in as many.
        (512, 32),  # Two of them.
        (2560, 6),  # Ten.
    ],
)
@pytest.mark.parametrize("experts", [64, 1000])
def test_programs_share_tiles_where_they_are_few(total, most, experts):
    """Of gate and up, whatever the number of experts; on Hopper."""
    shard = block_shard(total, 128, 1, 8)
    for hopper, shared in ((True, 2), (False, 1)):
        few, more = (
            tile_choice.rule(pairs, experts, shard, hopper)
            for pairs in (most, most + 1)
        )
        assert (few.gate_up_splits, more.gate_up_splits) == (shared, 1)
        assert few.gate_up == more.gate_up


@pytest.mark.parametrize(
    ("each", "narrow", "wide"),
    [
        (0.2, (64, 8, 1), (64, 8, 1)),
        (0.5, (128, 6, 1), (64, 6, 1)),
        (4, (128, 3, 2), (64, 3, 4)),
        (20, (64, 3, 4), (64, 3, 4)),
        (100, (64, 3, 2), (64, 3, 2)),
        (999, (64, 3, 1), (64, 3, 1)),
    ],
)
def test_down_of_wide_shards(each, narrow, wide):
    """Columns and stages of a tile, and programs of a block."""

    def of(shard):
        tiles = rule(each, shard)
        splits = getattr(tiles, "down_splits", 1)
        return tiles.down.block_n, tiles.down.num_stages, splits

    # Of three blocks that rank has parts of, it holds two blocks' columns.
    assert of(QWEN) == of(block_shard(1408, 128, 2, 8)) == narrow
    assert of(CODER) == of(WIDEST) == wide
    assert rule(each).gate_up == rule(each, CODER).gate_up


def test_down_of_wide_shards_in_99_kib():
    for each in 0.2, 4, 20:
        assert rule(each, WIDEST, hopper=False) == rule(each, hopper=False)
    down = [rule(99, each, hopper=False).down for each in (QWEN, CODER, WIDEST)]
    assert [tile.num_stages for tile in down] == [3, 3, 2]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The user's folder, and one in the place of ours; of 4 experts x 192 columns."""
    users, ours = tmp_path / "users", tmp_path / "ours"
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(users))
    monkeypatch.setattr(tuned_tiles, "_FOLDERS", (ours,))
    name = tuned_tiles.config_name(4, 192)
    for folder in users, ours:
        folder.mkdir()
    tuned_tiles.tuned_tiles.cache_clear()
    yield users / name, ours / name
    tuned_tiles.tuned_tiles.cache_clear()


def test_the_users_file_goes_first(folders, monkeypatch):
    """As vLLM's variable says of its own kernels' files."""
    users, ours = folders
    users.write_text(json.dumps({"8": PAIRS}))
    ours.write_text(json.dumps({"16": PAIRS}))
    assert [*tuned_tiles.tuned_tiles(4, 192)] == [8]
    for changed in (users.unlink, lambda: monkeypatch.delenv(VARIABLE)):
        changed()
        tuned_tiles.tuned_tiles.cache_clear()
        assert [*tuned_tiles.tuned_tiles(4, 192)] == [16]


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"8": ',
        "\x00",
        "[" * 100_000,
        json.dumps({"8": {**PAIRS, "block_k": 64}}),
        json.dumps({"8": {**PAIRS, "down": {**TILE, "num_warps": 3}}}),
        "{}",
    ],
    ids=["empty", "cut off", "binary", "deep", "unknown option", "value", "no entries"],
)
@pytest.mark.parametrize("which", ["users", "ours"])
def test_a_damaged_file_is_named_once_and_a_rule_is_used(folders, caplog, text, which):
    file = folders[which == "ours"]
    file.write_text(text)
    shard = block_shard(384, 128, 0, 2)
    for tokens in (1, 4096):
        chosen = tile_choice.tiles_for(tokens, 2, 4, 256, shard)
        assert chosen == tile_choice.rule(tokens * 2, 4, shard, hopper=True).fit(256)
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    (warning,) = [r.getMessage() for r in warnings if str(file) in r.getMessage()]
    assert "a rule is used" in warning and "delete" in warning


def test_a_file_that_cannot_be_read(folders, caplog):
    folders[0].mkdir()
    assert tuned_tiles.tuned_tiles(4, 192) == {}
    assert f"Is a directory: '{folders[0]}'" in caplog.text
