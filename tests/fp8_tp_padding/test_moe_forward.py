# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sharded experts compute what the unsharded ones do."""

import pytest
import torch

from . import exact, experts
from .experts import Checkpoint, build, load, vllm_version
from .moe_reference import ACTIVATIONS, reference, relative_error
from .tensor_parallel import runs_kernels

pytestmark = runs_kernels

TOKENS, EXPERTS, TOP_K, HIDDEN = 5, 3, 2, 256


def routing():
    generator = torch.Generator().manual_seed(2)
    x = exact.activations(TOKENS, HIDDEN)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float32)
    weights, ids = logits.softmax(-1).topk(TOP_K, -1)
    return x, weights, ids.to(torch.int32)


@pytest.fixture
def padded_store(monkeypatch):
    """Keep whole blocks, for vLLM's own kernels."""
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "padded")


@pytest.mark.parametrize(
    ("total", "tp_size"),
    [
        (1536, 8),  # leads of 0 and 64
        (640, 8),  # 80 columns: some ranks straddle a block boundary
        (1408, 8),  # 176 columns: some straddle two
        (512, 8),  # 64 columns: less than a block
    ],
)
def test_ranks_sum_to_the_reference(padded_store, total, tp_size):
    checkpoint = Checkpoint.exact(total, experts=EXPERTS, hidden=HIDDEN)
    inputs = routing()
    summed = sum_of_ranks(checkpoint, total, tp_size, inputs)
    expected = reference(checkpoint, total, tp_size, *inputs)
    expected.check(summed)


def test_ranks_sum_to_the_reference_with_biases(padded_store):
    checkpoint = Checkpoint.exact(384, experts=EXPERTS, hidden=HIDDEN)
    generator = torch.Generator().manual_seed(3)
    biases = {
        # Of the gate's and up's size, and exact next to them.
        shard: torch.randint(-9, 10, (EXPERTS, size), generator=generator) / 4
        for shard, size in (("w1", 384), ("w3", 384), ("w2", HIDDEN))
    }
    inputs = routing()
    summed = sum_of_ranks(checkpoint, 384, 2, inputs, biases)
    expected = reference(checkpoint, 384, 2, *inputs, biases)
    expected.check(summed)


def sum_of_ranks(checkpoint, total, tp_size, inputs, biases=None):
    x, weights, ids = inputs
    summed = torch.zeros(TOKENS, HIDDEN)
    for rank in range(tp_size):
        layer = build(
            total,
            tp_size,
            rank,
            experts=EXPERTS,
            hidden=HIDDEN,
            dtype=torch.float32,
            has_bias=bool(biases),
        )
        experts.poison(layer)
        load(layer, checkpoint)
        for shard, stacked in (biases or {}).items():
            name = f"{experts.SHARDS[shard]}_bias"
            for expert, bias in enumerate(stacked):
                experts.load_tensor(layer, name, bias, shard, expert)
        experts.process(layer, tp_size, rank, torch.float32)
        with experts.rank_of(tp_size, rank, torch.float32):
            summed += through_stock_kernels(layer, x, weights, ids)
    return summed


def through_stock_kernels(layer, x, weights, ids):
    """In float32: the method would have them round to bfloat16 in between."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    config = layer.quant_method.moe_quant_config
    return fused_experts(
        x, layer.w13_weight, layer.w2_weight, weights, ids, quant_config=config
    )


def layer_output(total, tp_size, rank, checkpoint, x, weights, ids, **kwargs):
    layer = build(total, tp_size, rank, experts=EXPERTS, hidden=HIDDEN, **kwargs)
    experts.poison(layer)
    load(layer, checkpoint)
    experts.process(layer, tp_size, rank)
    with experts.rank_of(tp_size, rank):
        return through_the_method(layer, x.bfloat16(), weights, ids).float()


def through_the_method(layer, x, weights, ids):
    output = layer.quant_method.apply(
        layer, x, weights.clone(), ids.clone(), None, None
    )
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("store", ["auto", "padded"])
@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "silu"])
def test_a_layers_activation(monkeypatch, name, store):
    """On its own path and in vLLM's kernels, nearer to it than to any other one."""
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", store)
    activation = ACTIVATIONS[name]
    checkpoint = Checkpoint.exact(384, EXPERTS, HIDDEN, gated=activation.gated)
    x, *routed = routing()
    inputs = x * activation.bend, *routed
    out = layer_output(384, 2, 1, checkpoint, *inputs, **activation.kwargs)
    errors = {"nothing": 1.0}
    for each in ACTIVATIONS:
        if ACTIVATIONS[each].gated == activation.gated:
            expected = reference(checkpoint, 384, 2, *inputs, None, [1], each)
            errors[each] = relative_error(out, expected.value)
    if (name, store) == ("clamped", "padded") and vllm_version() < (0, 31):
        # vLLM's kernels drop the limit, however they are cut.
        assert errors["silu"] < 0.1 < errors["clamped"]
        return
    # 0.04 at most: bfloat16 makes some codes one of their neighbours.
    assert errors.pop(name) < 0.1 < min(errors.values())


def share_of_stock_error() -> float:
    """Return the layers' error at TP 4 relative to that of stock ones at TP 2.

    bfloat16 rounds between the products, so stock at TP 2 says how much.
    Qwen3-30B-A3B: 192 columns at TP 4.
    """
    checkpoint = Checkpoint.exact(768, experts=EXPERTS, hidden=HIDDEN)
    inputs = routing()
    errors = {}
    for tp_size in (2, 4):
        summed = sum(
            layer_output(768, tp_size, rank, checkpoint, *inputs)
            for rank in range(tp_size)
        )
        x, weights, ids = inputs
        expected = reference(checkpoint, 768, tp_size, x.bfloat16(), weights, ids)
        errors[tp_size] = relative_error(summed, expected.value)
    return errors[4] / errors[2]


def test_the_layers_own_path_is_as_exact_as_an_aligned_one(padded_store):
    # 0.72; a code that flips on another CPU is a thousandth of it.
    assert share_of_stock_error() < 0.9
