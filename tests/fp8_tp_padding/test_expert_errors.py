# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints that cannot be right stop the load, and the message says what to do."""

import pytest
import regex as re
import torch

from . import experts
from .experts import BLOCK, FP8, PREFIX, Checkpoint, build, load


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "padded")
    return build(1536, 8, 3)


def fails(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def test_scale_of_the_wrong_shape(layer):
    with fails(
        f"{PREFIX}: {PREFIX}.w13_weight_scale_inv of expert 1 (w3) has shape (11, 2), "
        "but the model needs (12, 2), one scale for each quant block. Check "
        "the layer's sizes and weight_block_size in config.json"
    ):
        experts.load_tensor(
            layer, "w13_weight_scale_inv", torch.ones(11, 2), "w3", expert=1
        )


def test_weight_of_the_wrong_shape(layer):
    with fails(
        "w2_weight of expert 0 (w2) has shape (256, 1537), but the model needs "
        "(256, 1536). Check the layer's sizes and weight_block_size in config.json"
    ):
        experts.load_tensor(
            layer, "w2_weight", torch.zeros(256, 1537).to(FP8), "w2", expert=0
        )


@pytest.mark.parametrize("columns", [192, 256])
def test_tensor_that_is_split_already(layer, columns):
    with fails(
        f"w2_weight of expert 0 (w2) has shape (256, {columns}), but the model needs "
        "(256, 1536): it looks already split for tensor parallelism"
    ):
        experts.load_tensor(
            layer, "w2_weight", torch.zeros(256, columns).to(FP8), "w2", expert=0
        )


def test_scale_that_is_split_already(layer):
    with fails("(2 of 12 in dimension 0). Load the unsharded checkpoint."):
        experts.load_tensor(
            layer, "w13_weight_scale_inv", torch.ones(2, 2), "w1", expert=0
        )


def test_weight_that_is_not_quantized(layer):
    with fails("has dtype torch.bfloat16, but a block-quantized FP8 weight is"):
        experts.load_tensor(
            layer, "w13_weight", torch.ones(1536, 256).bfloat16(), "w1", expert=0
        )


@pytest.mark.parametrize(
    ("value", "shown"),
    [(float("nan"), "nan"), (float("inf"), "inf"), (0.0, "0.0"), (-0.5, "-0.5")],
)
def test_scale_that_is_no_scale(layer, value, shown):
    checkpoint = Checkpoint.random(1536)
    checkpoint.scales["w2"][1, 0, 5] = value  # Rank 3 holds blocks 4 and 5.
    load(layer, checkpoint)
    with fails(
        f"{PREFIX}: w2_weight_scale_inv of expert 1 (w2) holds the scale {shown} for "
        "block (0, 5) of the checkpoint; a block scale must be finite and positive."
    ):
        experts.process(layer, 8, 3)


def test_scale_of_up_is_named_as_such(layer):
    checkpoint = Checkpoint.random(1536)
    checkpoint.scales["w3"][0, 4, 1] = -1.0
    load(layer, checkpoint)
    with fails(
        "w13_weight_scale_inv of expert 0 (w3) holds the scale -1.0 for block (4"
    ):
        experts.process(layer, 8, 3)


@pytest.mark.parametrize("broken", ["shape", "value"])
def test_a_load_that_failed_does_not_complete_the_next_one(layer, broken):
    checkpoint = Checkpoint.random(1536)
    load(layer, checkpoint)
    with pytest.raises(ValueError):
        if broken == "shape":
            experts.load_tensor(layer, "w13_weight", torch.zeros(1), "w1", 0)
        layer.w2_weight_scale_inv.data[0] = float("nan")
        experts.process(layer, 8, 3)
    experts.load_tensor(layer, "w13_weight", checkpoint.weights["w1"][0], "w1", 0)
    with fails("(11 of 12 tensors are)"):
        experts.process(layer, 8, 3)


def test_a_layer_whose_load_was_refused_is_not_used(layer):
    """Though all came before, and nothing after."""
    load(layer, Checkpoint.random(1536))
    with pytest.raises(ValueError):
        experts.load_tensor(layer, "w13_weight", torch.zeros(1), "w1", 0)
    with fails("(12 of 12 tensors are)"):
        experts.process(layer, 8, 3)


def test_missing_scale(layer):
    checkpoint = Checkpoint.random(1536)
    checkpoint.scales["w3"] = []
    load(layer, checkpoint)
    with fails(
        f"{PREFIX}: w13_weight_scale_inv of expert 0 (w3) is missing from the "
        "checkpoint (2 of 12 tensors are). Download or quantize"
    ):
        experts.process(layer, 8, 3)


def test_fused_tensor_with_another_number_of_experts(layer):
    with fails(
        f"{PREFIX}: the fused tensor for w13_weight holds 5 experts, but the layer "
        "has 2. Check the number of experts in config.json"
    ):
        experts.load_tensor(
            layer, "w13_weight", torch.zeros(5, 1536, 256).to(FP8), "w1", expert=0
        )


def test_shard_of_another_parameter(layer):
    with fails("came with shard_id = 'w2'; w13_weight takes ['w1', 'w3']"):
        experts.load_tensor(
            layer, "w13_weight", torch.zeros(1536, 256).to(FP8), "w2", expert=0
        )


def test_interleaved_gate_and_up():
    with fails(
        f"{PREFIX}: w13_weight cannot be padded to quant blocks: activation = "
        "swigluoai interleaves gate and up rows"
    ):
        build(1536, 8, 3, activation="swigluoai")


def test_e8m0_scales_are_exact(layer):
    """Powers of two as DeepSeek stores them; float32 holds each of them."""
    scale = torch.exp2(torch.arange(-12, 12).float()).reshape(12, 2)
    e8m0 = scale.to(torch.float8_e8m0fnu)
    assert experts.load_tensor(layer, "w13_weight_scale_inv", e8m0, "w1", expert=0)
    slot, _ = layer.w13_weight_scale_inv.data[0].chunk(2)
    first = 3 * 192 // BLOCK
    assert torch.equal(slot, scale[first : first + 2])
