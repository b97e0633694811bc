"""What is tried, and the order that is kept."""

from dataclasses import replace

import pytest
import torch

from vllm_patch.cli import UsageError
from vllm_patch.cli.tune import candidates, search
from vllm_patch.cli.tune.cases import Case
from vllm_patch.cli.tune.search import Option
from vllm_patch.fp8_tp_padding.kernels.masked_moe import Problem
from vllm_patch.fp8_tp_padding.kernels.tiles import PairTiles, SortedTiles

HOPPER = candidates.Gpu(132, 232448, True, True)
ANY = candidates.ANY
QWEN = Case(128, 8, 4096, 1536, 8)
OTHER = replace(HOPPER, launches_dependently=False, is_hopper=False)
ADA = replace(OTHER, shared_memory=101376)


def option(block_m: int, cost: float) -> Option:
    tiles = SortedTiles(block_m, ANY, ANY) if block_m else PairTiles(ANY, ANY)
    return Option(tiles, 10.0, cost, cost)


def blocks(options: list[Option]) -> list[int]:
    return [each.tiles.block_m for each in options]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ([{0: 5, 16: 9}, {0: 5, 16: 9}], [0, 0]),
        ([{0: 9, 16: 5}, {0: 9, 16: 5}], [16, 16]),
        # The second gains more by not sorting than the first by sorting.
        ([{0: 9, 16: 5}, {0: 2, 16: 9}], [0, 0]),
        ([{0: 9, 16: 2}, {0: 5, 16: 9}], [16, 16]),
        ([{16: 9, 32: 5}, {16: 5, 32: 9}, {32: 9, 64: 5}], [16, 16, 64]),
    ],
)
def test_blocks_never_get_smaller(options, chosen):
    found = [[option(*pair) for pair in each.items()] for each in options]
    assert blocks(search.in_order(found)) == chosen


def test_what_cannot_be_in_order():
    with pytest.raises(UsageError, match="Leave out --tokens"):
        search.in_order([[option(32, 1.0)], [option(16, 1.0)]])


def path(tokens: int, tiles=None, gpu=HOPPER, time=50.0) -> candidates.Path:
    case = QWEN
    sizes = tokens, case.top_k, case.hidden, case.experts, case.shard, torch.bfloat16
    problem = Problem(*sizes)
    tiles = tiles or candidates.starts(problem, gpu)[0]
    return candidates.Path(problem, gpu, min(128, 8 * tokens), tiles, time)


@pytest.mark.parametrize(
    ("tokens", "kinds"),
    [
        (1, [0]),
        (16, [0, 16]),
        (128, [16, 32]),
        (512, [32, 64]),
        (16384, [64]),
    ],
)
def test_paths_by_pairs_of_an_expert(tokens, kinds):
    problem = path(tokens).problem
    found = candidates.starts(problem, HOPPER)
    assert [tiles.block_m for tiles in found] == kinds
    assert all(tiles.pdl == (tiles.block_m < 64) for tiles in found)
    assert not any(tiles.pdl for tiles in candidates.starts(problem, OTHER))


def test_unsorted_pairs_that_fill_the_gpu_are_operands_of_wgmma():
    swapped = [tiles.gate_up.swap for tiles in candidates.gate_up(path(1))]
    assert any(swapped) and not all(swapped)
    wide = candidates.gate_up(path(16))
    assert wide and all(tiles.gate_up.swap for tiles in wide)


def test_splits_of_gate_and_up_until_the_gpu_is_full():
    for tokens, most in (1, 8), (4, 4), (16, 1):
        found = {tiles.gate_up_splits for tiles in candidates.gate_up(path(tokens))}
        assert max(found) == most
        assert 1 in found


@pytest.mark.parametrize("block_m", [0, 16, 32, 64])
def test_loads_fit_the_shared_memory(block_m):
    """Of 99 KiB, where the same tiles with fewer loads in flight are left."""
    tiles = SortedTiles(block_m, ANY, ANY) if block_m else PairTiles(ANY, ANY)
    for choices in candidates.gate_up, candidates.down:
        hopper, ada = (choices(path(64, tiles, gpu)) for gpu in (HOPPER, ADA))
        assert ada and {*ada} <= {*hopper}
    for found in candidates.gate_up(path(64, tiles, ADA)):
        tile = found.gate_up
        rows = (block_m or 16) + 2 * tile.block_n
        assert tile.num_stages * tile.unroll * rows * 128 <= ADA.shared_memory


def test_downs_programs_fill_the_gpu_and_no_more():
    tiles = SortedTiles(16, ANY, ANY)
    for blocks, splits in ((16, [16]), (128, [2, 4, 8]), (600, [1, 2]), (5000, [])):
        found = candidates.down_splits(replace(path(64, tiles), blocks=blocks))
        assert [each.down_splits for each in found] == splits


def test_dependent_launch_where_it_shows():
    assert not candidates.dependent_launch(path(1))[0].pdl
    assert candidates.dependent_launch(path(1, PairTiles(ANY, ANY)))[0].pdl
    assert not candidates.dependent_launch(path(1, gpu=ADA))
    assert not candidates.dependent_launch(path(4096, time=400.0))


@pytest.fixture
def specializes(monkeypatch):
    """As where Triton compiles the kernel, and the problem fits it."""
    monkeypatch.setattr(candidates, "can_specialize", lambda problem: True)


@pytest.mark.parametrize(("tokens", "tried"), [(511, False), (512, True), (9999, True)])
def test_where_warps_that_specialize_are_tried(specializes, monkeypatch, tokens, tried):
    """From 32 pairs of an expert on, on Hopper."""
    problem = path(tokens).problem

    def found(gpu):
        return [t for t in candidates.starts(problem, gpu) if t.group_m > t.block_m]

    assert [tiles.specialized for tiles in found(HOPPER)] == tried * [True]
    assert not found(OTHER)
    monkeypatch.setattr(candidates, "can_specialize", lambda problem: False)
    assert not found(HOPPER)


def test_both_ways_of_blocks_of_64_are_paths(specializes):
    starts = candidates.starts(path(4096).problem, HOPPER)
    assert [(each.group_m, each.block_m) for each in starts] == [(64, 64), (128, 64)]


def test_what_is_left_to_choose_of_warps_that_specialize(specializes):
    tiles = candidates.starts(path(4096).problem, HOPPER)[-1]
    known = path(4096, tiles)
    assert candidates.gate_up(known) == candidates.dependent_launch(known) == []
    assert {each.specialized for each in candidates.down(known)} == {True}


def test_warps_that_specialize_add_as_others_do():
    """Down's tiles and splits apart: both are compared bit for bit."""
    plain = SortedTiles(64, replace(ANY, num_stages=4), ANY, 2)
    for gate_up in ANY, replace(ANY, swap=True):
        specialized = SortedTiles(64, gate_up, ANY, 1, specialized=True)
        order = candidates.order_of_sums(specialized)
        assert order == candidates.order_of_sums(plain)
    swapped = replace(plain, down=replace(ANY, swap=True))
    assert order != candidates.order_of_sums(swapped)


def test_groups_of_blocks_do_not_get_smaller():
    groups = [option(64, 5.0)], [option(64, 5.0)]
    groups[0][0] = replace(
        groups[0][0], tiles=replace(groups[0][0].tiles, specialized=True)
    )
    with pytest.raises(UsageError, match="get smaller"):
        search.in_order([*groups])
    search.in_order([*reversed(groups)])
