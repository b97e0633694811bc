"""DeepSeek-V4's config, which extends that of plain FP8: 3072 / TP 16 = 192."""

import pytest
import torch

from tests.fp8_tp_padding import experts
from tests.fp8_tp_padding.experts import BLOCK, Checkpoint, dequantize, poison
from tests.fp8_tp_padding.test_linear_loading import HIDDEN, build, load, matrix

TP, TOTAL = 16, 3072


def config_with(expert_dtype):
    def make():
        from vllm.models.deepseek_v4.quant_config import DeepseekV4FP8Config

        config = DeepseekV4FP8Config(
            is_checkpoint_fp8_serialized=True, weight_block_size=[BLOCK, BLOCK]
        )
        # What it reads from the model's config.
        config._resolved_expert_dtype = expert_dtype
        return config

    return make


def test_experts_in_blocks_rebuild(plugin):
    """Compact, as vLLM chooses its Triton kernels here."""
    checkpoint = Checkpoint.random(TOTAL)
    size = TOTAL // TP
    for rank in (1, 0, 15):
        layer = experts.build(TOTAL, TP, rank, quant_config=config_with("fp8"))
        assert type(layer.quant_method).__name__ == "CutFp8MoEMethod"
        poison(layer)
        experts.load(layer, checkpoint)
        mine = slice(rank * size, rank * size + size)
        assert torch.equal(
            layer.w2_weight.data.view(torch.uint8),
            checkpoint.weights["w2"].view(torch.uint8)[..., mine],
        )


@pytest.mark.parametrize("rank", [15, 7, 0])
def test_linear_layers_with_scales_that_are_powers_of_two(plugin, rank):
    """Beside experts in FP4, as published: the scales are float8_e8m0fnu."""
    sizes = {"input_size": TOTAL, "output_size": HIDDEN, "bias": False}
    make = config_with("fp4")
    layer = build("RowParallelLinear", TP, rank, quant_config=make, **sizes)
    assert type(layer.quant_method).__name__ == "CutFp8LinearMethod"
    assert layer.weight_scale_inv.dtype == torch.float8_e8m0fnu
    weight, scale = matrix(HIDDEN, TOTAL, seed=0)
    scale = torch.exp2(scale.log2().round()).to(torch.float8_e8m0fnu)
    poison(layer)
    load(layer, {None: (weight, scale)})
    size = TOTAL // TP
    lead = rank * size % BLOCK
    mine = dequantize(layer.weight.data, layer.weight_scale_inv.data.float())
    whole = dequantize(weight, scale.float())
    assert torch.equal(
        mine[:, lead : lead + size], whole[:, rank * size : rank * size + size]
    )
