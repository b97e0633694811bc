# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The masked kernels, through Triton's interpreter, on real compact layers."""

import dataclasses

import pytest
import torch

from . import exact, experts
from .experts import Checkpoint, build, load
from .moe_reference import reference, relative_error
from .tensor_parallel import runs_kernels

pytestmark = runs_kernels

EXPERTS, TOP_K, HIDDEN = 4, 2, 256


def paths():
    """Every path through the kernels, with tiles that cut spans differently."""
    from vllm.model_executor.layers.quantization.fp8_tp_padding.tiles import Tile, Tiles

    return {
        "pairs": Tiles(False, 16, Tile(32, 4, 3, unroll=2), Tile(64, 4, 3)),
        "pairs, swapped": Tiles(
            False, 16, Tile(64, 4, 3, swap=True), Tile(64, 4, 3, swap=True)
        ),
        "sorted": Tiles(True, 16, Tile(32, 4, 3), Tile(128, 4, 2), down_splits=2),
        "sorted, swapped": Tiles(
            True, 16, Tile(64, 4, 3, swap=True), Tile(64, 4, 2, swap=True)
        ),
        "quantized": Tiles(
            True, 16, Tile(128, 4, 3), Tile(64, 4, 2), quantize_in_gate_up=True
        ),
        "pairs, quantized": Tiles(
            False, 16, Tile(128, 4, 3), Tile(64, 4, 2), quantize_in_gate_up=True
        ),
    }


PATHS = ("pairs", "pairs, swapped", "sorted", "sorted, swapped", "quantized")
PATHS += ("pairs, quantized",)


def tokens(count: int, skewed: bool = False):
    generator = torch.Generator().manual_seed(count)
    x = exact.activations(count, HIDDEN, seed=count)
    logits = torch.randn(count, EXPERTS, generator=generator, dtype=torch.float32)
    if skewed:
        # One expert gets every token, another one none.
        logits[:, 0], logits[:, 1] = 9, -9
    weights, ids = logits.softmax(-1).topk(TOP_K, -1)
    return x, weights, ids.to(torch.int32)


def compact_layer(total, tp_size, rank, checkpoint):
    layer = build(
        total, tp_size, rank, experts=EXPERTS, hidden=HIDDEN, dtype=torch.float32
    )
    assert layer.quant_method.padded_because is None
    experts.poison(layer)
    load(layer, checkpoint)
    experts.process(layer, tp_size, rank, torch.float32)
    return layer


def run(layer, tiles, x, weights, ids, expert_map=None, num_ids=EXPERTS, shard=None):
    from vllm.model_executor.layers.quantization.fp8_tp_padding import masked_moe

    shard = shard or layer.quant_method.block_shard
    problem = masked_moe.Problem(
        *(x.shape[0], ids.shape[1], HIDDEN, num_ids, shard, x.dtype, tiles)
    )
    workspace = torch.full((problem.workspace_bytes,), 0xFF, dtype=torch.uint8)
    out = torch.full_like(x, float("nan"))
    masked_moe.masked_moe(
        out,
        x,
        masked_moe.Weights(
            layer.w13_weight,
            layer.w2_weight,
            layer.w13_weight_scale_inv,
            layer.w2_weight_scale_inv,
        ),
        masked_moe.Routing(weights, ids, expert_map),
        problem,
        workspace,
    )
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("total", "tp_size", "rank"),
    [
        (384, 2, 1),  # starts in the middle of a block
        (640, 8, 1),  # 80 columns that straddle a boundary
        (1408, 8, 1),  # 176 columns that straddle two
        (512, 8, 1),  # 64 columns, the second half of a block
    ],
)
def test_a_straddling_rank_matches_the_reference(total, tp_size, rank, path):
    checkpoint = Checkpoint.exact(total, experts=EXPERTS, hidden=HIDDEN)
    layer = compact_layer(total, tp_size, rank, checkpoint)
    inputs = tokens(3)
    expected = reference(checkpoint, total, tp_size, *inputs, ranks=[rank])
    out = run(layer, paths()[path], *inputs)
    expected.check(out)


@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_lead_shows(path):
    checkpoint = Checkpoint.exact(384, experts=EXPERTS, hidden=HIDDEN)
    layer = compact_layer(384, 2, 1, checkpoint)
    inputs = tokens(2)
    expected = reference(checkpoint, 384, 2, *inputs, ranks=[1])
    tail_only = dataclasses.replace(layer.quant_method.block_shard, lead=0)
    out = run(layer, paths()[path], *inputs, shard=tail_only)
    assert relative_error(out, expected.value) > 0.1


@pytest.mark.parametrize(
    ("path", "count", "skewed"),
    [
        ("pairs", 1, False),
        ("pairs, swapped", 2, False),
        ("sorted", 1, False),
        ("sorted, swapped", 17, True),
    ],
)
def test_batches(path, count, skewed):
    checkpoint = Checkpoint.exact(384, experts=EXPERTS, hidden=HIDDEN)
    layer = compact_layer(384, 2, 1, checkpoint)
    inputs = tokens(count, skewed)
    expected = reference(checkpoint, 384, 2, *inputs, ranks=[1])
    out = run(layer, paths()[path], *inputs)
    expected.check(out)


@pytest.mark.parametrize("path", ["pairs", "sorted, swapped"])
def test_remote_experts_and_padding_tokens_add_nothing(path):
    checkpoint = Checkpoint.exact(384, experts=EXPERTS, hidden=HIDDEN)
    layer = compact_layer(384, 2, 1, checkpoint)
    x, weights, local = tokens(5)
    # Global experts 1, 3, 5 and 7 live here, in another order.
    order = torch.tensor([5, 1, 7, 3])
    expert_map = torch.full((8,), -1, dtype=torch.int32)
    expert_map[order] = torch.arange(EXPERTS, dtype=torch.int32)
    ids = order[local.long()].to(torch.int32)
    ids[1, 0], local[1, 0] = 4, -1  # remote
    ids[4], local[4] = -1, -1  # a padding token
    expected = reference(checkpoint, 384, 2, x, weights, local, ranks=[1])
    out = run(layer, paths()[path], x, weights, ids, expert_map, num_ids=8)
    expected.check(out)
    assert not out[4].any()


def test_sorting_many_pairs_in_chunks(monkeypatch):
    from vllm.model_executor.layers.quantization.fp8_tp_padding.masked_moe import (
        Problem,
    )

    checkpoint = Checkpoint.exact(384, experts=EXPERTS, hidden=HIDDEN)
    layer = compact_layer(384, 2, 1, checkpoint)
    inputs = tokens(40)
    expected = run(layer, paths()["sorted"], *inputs)
    monkeypatch.setattr(Problem, "chunk", 32)
    assert torch.equal(run(layer, paths()["sorted"], *inputs), expected)
