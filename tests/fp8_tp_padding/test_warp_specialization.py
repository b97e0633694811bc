# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which calls multiply by gate and up with warps that specialize, and how it starts.

What it computes is compared on GPUs only, with the other kernel, bit for bit
(``benchmarks.moe``, ``vllm-patch tune``): Gluon is not interpreted.
"""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels import (
    launches,
    masked_moe,
    tile_choice,
    warp_specialization,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels import (
    tiles as kernel_tiles,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels.masked_activation import (  # noqa: E501
    Activation,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels.tiles import (
    SortedTiles,
    Tile,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.slices.shard import (
    block_shard,
)

from .experts import Checkpoint
from .tensor_parallel import runs_kernels
from .test_masked_moe import EXPERTS, HIDDEN, compact_layer, run, tokens

pytestmark = runs_kernels

TILE = Tile(64, 4, 3)
SPECIALIZED = SortedTiles(64, TILE, TILE, specialized=True)
# Qwen3-235B at TP 8, the rank that starts inside a block: three tiles of 64 columns.
SHARD = block_shard(1536, 128, 1, 8)
QWEN = masked_moe.Problem(1024, 8, 4096, 128, SHARD, torch.bfloat16)


@pytest.fixture
def gluon(monkeypatch):
    """The module of the kernel, as where it compiles."""
    release = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    stock = warp_specialization.triton
    triton = SimpleNamespace(__version__=stock.__version__, knobs=release)
    monkeypatch.setattr(warp_specialization, "triton", triton)
    warp_specialization.hopper_gate_up.cache_clear()
    yield warp_specialization.hopper_gate_up()
    warp_specialization.hopper_gate_up.cache_clear()


def is_specialized(problem, wanted=SPECIALIZED) -> bool:
    plan = masked_moe.plan_for(problem, wanted)
    names = [launch.kernel.__name__ for launch in plan.launches()]
    assert len(names) == (5 if plan.placed == "sorted" else 4)
    assert plan.tiles.specialized == ("hopper_gate_up_kernel" in names)
    assert plan.tiles.specialized != ("gate_up_kernel" in names)
    return plan.tiles.specialized


def test_what_takes_it(gluon):
    assert is_specialized(QWEN)
    assert not is_specialized(QWEN, replace(SPECIALIZED, specialized=False))
    for kind in "swiglustep", "gelu_tanh":
        assert is_specialized(replace(QWEN, activation=Activation(kind, 7.0)))
    for size, rank in (384, 1), (1408, 1), (2560, 7):
        assert is_specialized(replace(QWEN, shard=block_shard(size, 128, rank, 8)))


@pytest.mark.parametrize(
    "changed",
    [
        {"activation": Activation("relu2")},  # It has no up.
        {"hidden": 128 * 21},  # Quant blocks come in twos.
        {"num_tokens": 2**20 + 1},  # 2**32 bytes of codes.
        {"num_tokens": 16},  # Programs find pairs by themselves.
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_does_not(gluon, changed):
    assert not is_specialized(replace(QWEN, **changed))


def test_the_most_that_offsets_reach(gluon):
    assert is_specialized(replace(QWEN, num_tokens=2**20))


def test_where_pairs_are_just_sorted(gluon):
    assert is_specialized(replace(QWEN, num_tokens=17))


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0"])
def test_a_triton_that_is_not_known(gluon, monkeypatch, version):
    monkeypatch.setattr(warp_specialization.triton, "__version__", version)
    warp_specialization.hopper_gate_up.cache_clear()
    assert not is_specialized(QWEN)


def test_a_triton_that_is_known(gluon, monkeypatch):
    for release in warp_specialization.TRITON:
        version = f"{release}.1+git12345"
        monkeypatch.setattr(warp_specialization.triton, "__version__", version)
        warp_specialization.hopper_gate_up.cache_clear()
        assert is_specialized(QWEN)


def test_what_is_interpreted(gluon, monkeypatch):
    monkeypatch.setattr(warp_specialization.triton.knobs.runtime, "interpret", True)
    warp_specialization.hopper_gate_up.cache_clear()
    assert not is_specialized(QWEN)


@pytest.mark.parametrize("hopper", [True, False])
def test_hopper_takes_it_and_no_other_gpu(monkeypatch, hopper):
    """Whether a rule or a tuned file says so, which may have been copied."""
    platform = SimpleNamespace(is_device_capability=lambda capability: hopper)
    monkeypatch.setattr(tile_choice, "current_platform", platform)
    for tuned in ({}, {8: SPECIALIZED}):
        monkeypatch.setattr(tile_choice, "tuned_tiles", lambda *_, found=tuned: found)
        chosen = tile_choice.tiles_for(4096, 8, 128, 4096, SHARD)
        assert chosen.specialized == hopper
        assert chosen.gate_up.block_n == 64 or not hopper


def test_the_rule_takes_it_for_many_pairs():
    chosen = [tile_choice.rule(each, 1, SHARD, hopper=True) for each in (31, 32, 512)]
    assert [found.specialized for found in chosen] == [False, True, True]


@pytest.mark.parametrize(
    "wrong", [{"block_m": 32}, {"block_m": 128}, {"pdl": True}, {"specialized": 1}]
)
def test_tiles_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="specialized = (True with block_m|1 is not)"):
        replace(SPECIALIZED, **wrong)


def test_weights_as_tma_takes_them(gluon):
    """A box has 64 rows of gate, each with the row of up beside it."""
    problem = replace(QWEN, num_experts=4, hidden=256, num_tokens=4096)
    launch = masked_moe.plan_for(problem, SPECIALIZED)._gate_up()
    codes = torch.arange(4 * 384 * 256).remainder(251).to(torch.uint8)
    codes = codes.view(4, 384, 256)
    w13 = codes.view(torch.float8_e4m3fn)
    places = dict.fromkeys([*launch.tensors], torch.empty(0))
    taken = launch.with_tensors({**places, "w13": w13})["w13_desc"]
    assert taken.base is w13
    assert taken.block_shape == [1, 64, 2, 128]
    viewed = w13.as_strided(taken.shape, taken.strides)
    assert torch.equal(viewed[3, :, 0].view(torch.uint8), codes[3, :192])
    assert torch.equal(viewed[3, :, 1].view(torch.uint8), codes[3, 192:])


def test_plans_describe_weights_alike(gluon):
    """So that one descriptor does for calls of all numbers of tokens."""
    few, many, others = (
        masked_moe.plan_for(problem, SPECIALIZED)._gate_up().described["w13"]
        for problem in (
            QWEN,
            replace(QWEN, num_tokens=4096),
            replace(QWEN, num_experts=64),
        )
    )
    assert few == many != others and hash(few) == hash(many)


def test_all_of_the_kernels_parameters_are_given(gluon):
    launch = masked_moe.plan_for(QWEN, SPECIALIZED)._gate_up()
    named = {f"{name}_ptr" for name in launch.tensors} | {"w13_desc"}
    given = named | launch.arguments.keys()
    assert given == {*launch.kernel.arg_names, "num_warps"}
    buffers = masked_moe.plan_for(QWEN, SPECIALIZED).buffers()
    assert {*launch.tensors} - {*buffers} == {"w13_scale"}


def test_no_more_programs_than_multiprocessors_or_tiles(gluon, monkeypatch):
    monkeypatch.setattr(launches, "_multiprocessors", lambda: 132)
    # Of 8192 pairs up to 64 + 128 groups of 128, each with three tiles.
    launch = masked_moe.plan_for(QWEN, SPECIALIZED)._gate_up()
    assert launch.programs == 192 * 3
    assert launch.grid == (132, 1, 1)
    few = replace(QWEN, num_experts=2, num_tokens=17)
    launch = masked_moe.plan_for(few, SPECIALIZED)._gate_up()
    assert launch.grid == (launch.programs, 1, 1) == (3 * 3, 1, 1)


@pytest.mark.parametrize(
    ("total", "tp", "rank", "tiles"),
    [
        (1408, 8, 1, 3),  # 176 columns from 48: four by the checkpoint's blocks.
        (384, 8, 1, 1),  # 48 columns from 48: two.
        (640, 8, 1, 2),
        (1536, 8, 0, 3),
    ],
)
def test_tiles_lie_where_fewest_do(gluon, total, tp, rank, tiles):
    problem = replace(QWEN, shard=block_shard(total, 128, rank, tp))
    launch = masked_moe.plan_for(problem, SPECIALIZED)._gate_up()
    assert launch.programs == 192 * tiles


def test_each_column_has_the_scales_of_its_block(gluon, monkeypatch):
    """By the kernel's own arithmetic: any lead and size of up to four blocks."""
    # As integers; its constants hold them.
    monkeypatch.setattr(gluon, "gl", SimpleNamespace(minimum=min))
    for name in "BLOCK", "COLUMNS":
        monkeypatch.setattr(gluon, name, getattr(gluon, name).value)
    cut_ones = 0
    for lead, size in itertools.product(range(128), [*range(1, 449, 7), 448]):
        num_blocks = -(-(lead + size) // 128)
        where = size, lead
        start, cut = gluon.start_of(*where), gluon.cut_of(*where)
        covered = []
        for tile in range(gluon.tiles_of(*where)):
            # Of one quant block along K: pointers count blocks.
            sizes = (8, 128, size, lead, num_blocks)
            rows = gluon._scale_rows.fn(0, 1, tile, sizes)
            assert len(rows) == (4 if cut else 2)
            for column in range(64):
                real = start + tile * 64 + column
                if not 0 <= real < size:
                    continue
                covered.append(real)
                gate, up = rows[2:] if cut and column >= cut else rows[:2]
                block = (lead + real) // 128
                assert (gate, up) == (2 * num_blocks + block, 3 * num_blocks + block)
            assert max(rows) < 4 * num_blocks
        assert covered == [*range(size)]
        on_grid = (lead + size - 1) // 64 - lead // 64 + 1
        assert gluon.tiles_of(*where) < on_grid if cut else start == -(lead % 64)
        cut_ones += cut > 0
    assert 0 < cut_ones < 128 * 65


def test_a_later_call_describes_weights_of_its_own():
    """Once for each address: a model has as many as layers, and calls each again."""
    described, ran = [], []

    def describe(base):
        described.append((base.data_ptr(), base.dtype))
        return f"descriptor of {base.data_ptr()}"

    binary = {(3, 1, 1): lambda *values, stream: ran.append(values)}
    kernel = SimpleNamespace(arg_names=["w_desc", "N", "x_ptr"])
    launch = launches.Launch(kernel, 3, ["x"], {"N": 5}, {"w": describe})
    tensors = {"x": torch.empty(1), "w": torch.empty(1, dtype=torch.float8_e4m3fn)}
    # A plan for each number of tokens.
    for addresses in ([16, 32], [48, 64], [80, 32]):
        launch.bound(binary, tensors)(addresses, stream=0)
    assert ran == [
        ("descriptor of 32", 5, 16),
        ("descriptor of 64", 5, 48),
        ("descriptor of 32", 5, 80),
    ]
    assert described == [(32, torch.float8_e4m3fn), (64, torch.float8_e4m3fn)]


@pytest.mark.parametrize("skewed", [False, True])
def test_pairs_sorted_in_groups_of_two_blocks(monkeypatch, skewed):
    """Also of an expert whose second block is empty; and one without any pair."""
    monkeypatch.setattr(kernel_tiles, "MOST_FOUND", 0)
    checkpoint = Checkpoint.exact(384, experts=EXPERTS, hidden=HIDDEN)
    layer = compact_layer(384, 2, 1, checkpoint)
    inputs = tokens(150, skewed)
    pairs = torch.bincount(inputs[2].flatten().long(), minlength=EXPERTS)
    blocks = -(-pairs // 64)
    assert (blocks % 2 == 1).any() and (pairs == 0).any() == skewed
    expected = run(layer, replace(SPECIALIZED, specialized=False), *inputs)
    # As where it does not fit, but with the places of where it does.
    monkeypatch.setattr(masked_moe, "can_specialize", lambda problem: True)
    monkeypatch.setattr(masked_moe.SortedPlan, "_gate_up", masked_moe._Plan._gate_up)
    assert torch.equal(run(layer, SPECIALIZED, *inputs), expected)


def test_empty_blocks_name_no_expert(monkeypatch):
    """So that down leaves them at once."""
    monkeypatch.setattr(masked_moe, "can_specialize", lambda problem: True)
    monkeypatch.setattr(kernel_tiles, "MOST_FOUND", 0)
    monkeypatch.setattr(masked_moe.SortedPlan, "_gate_up", masked_moe._Plan._gate_up)
    problem = masked_moe.Problem(100, 1, HIDDEN, EXPERTS, SHARD, torch.float32)
    plan = masked_moe.plan_for(problem, SPECIALIZED)
    ids = torch.tensor([0] * 30 + [2] * 65 + [-1] * 5, dtype=torch.int32)[:, None]
    made = {
        name: torch.full(shape, 77, dtype=torch.float32).to(dtype)
        for name, (shape, dtype) in plan.buffers().items()
    }
    x = torch.zeros(100, HIDDEN)
    for launch in plan.launches()[:2]:
        launch.through_triton({**made, "x": x, "topk_ids": ids})
    assert made["num_blocks"].item() == 4
    assert made["block_experts"][:4].tolist() == [0, -1, 2, 2]
    filled = made["sorted_pairs"][:256].view(4, 64)
    assert (filled < 100).sum(1).tolist() == [30, 0, 64, 1]
    assert (filled[filled >= 100] == 100).all()
