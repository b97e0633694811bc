"""Checkpoints whose weights are not in blocks: left to stock, and named if cut."""

import types

import pytest

from tests.fp8_tp_padding import experts
from tests.fp8_tp_padding.experts import BLOCK
from tests.fp8_tp_padding.tensor_parallel import rank_of
from tests.fp8_tp_padding.test_linear_loading import build
from vllm_patch.formats import checkpoint_format

from .configs import FORMATS

TP = 8
# Groups of 32 and 16 along an output's sum: 80 columns, and 72, cut one.
MXFP8, NVFP4 = ("MXFP8", 640, 32), ("NVFP4", 576, 16)


@pytest.fixture
def said(plugin, monkeypatch):
    """What warnings name: layers, size, TP size, columns, group, method or scheme."""
    arguments = []
    logger = types.SimpleNamespace(warning_once=lambda _, *args: arguments.append(args))
    monkeypatch.setattr(checkpoint_format, "logger", logger)
    return arguments


@pytest.mark.parametrize(("tp_size", "is_cut"), [(TP, True), (4, False)])
@pytest.mark.parametrize("with_blocks", [True, False])
@pytest.mark.parametrize(("algo", "total", "group"), [MXFP8, NVFP4])
def test_experts_whose_groups_are_cut(
    said, tp_size, is_cut, with_blocks, algo, total, group
):
    """Also beside other layers in FP8 blocks."""
    from vllm.model_executor.layers.quantization import modelopt

    name = {"MXFP8": "ModelOptMxFp8FusedMoE", "NVFP4": "ModelOptNvFp4FusedMoE"}[algo]
    stock = object.__new__(getattr(modelopt, name))
    layer = experts.build(total, tp_size, 1)
    others = checkpoint_format.CheckpointFormat(
        lambda _: [BLOCK, BLOCK] if with_blocks else None, {}, None
    )
    assert others.quant_method(lambda *_: stock, None, layer, "experts") is stock
    named = ("Experts", total, tp_size, total // tp_size, group, name)
    assert said == ([named] if is_cut else [])


@pytest.mark.parametrize(("tp_size", "is_cut"), [(TP, True), (4, False)])
@pytest.mark.parametrize(("algo", "total", "group"), [MXFP8, NVFP4])
def test_row_parallel_layers_whose_groups_are_cut(
    said, tp_size, is_cut, algo, total, group
):
    """Outputs hold whole groups, so column-parallel layers are never cut."""
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.quantization import modelopt

    if not FORMATS["modelopt"].is_in_release:
        pytest.skip("this release has no ModelOpt layers in FP8 blocks")
    kind = {
        "MXFP8": modelopt.ModelOptMxFp8Config,
        "NVFP4": modelopt.ModelOptNvFp4Config,
    }
    config = kind[algo].from_config(
        {
            "quant_method": "modelopt",
            "quant_algo": algo,
            "group_size": group,
            "ignore": [],
        }
    )
    with rank_of(tp_size, 1):
        for layer in (
            linear.RowParallelLinear(total, 256),
            linear.ColumnParallelLinear(256, total),
        ):
            method = config.get_quant_method(layer, "model.layers.0.layer")
            assert type(method) is modelopt.ModelOptLinearMethod
    named = [args[:5] for args in said]
    sizes = ("Row-parallel layers", total, tp_size, total // tp_size, group)
    assert named == ([sizes] if is_cut else [])


@pytest.mark.parametrize(("tp_size", "is_cut"), [(TP, True), (4, False)])
def test_groups_of_a_scheme(said, tp_size, is_cut):
    """compressed-tensors' NVFP4: its linear scheme does not say so in its name."""
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors,
    )

    config = FORMATS["compressed-tensors"].config()
    (group,) = config["config_groups"].values()
    group["weights"] = {
        **{"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False},
        **{"strategy": "tensor_group", "group_size": 16},
    }
    group["input_activations"] = None
    config["format"] = group["format"] = "nvfp4-pack-quantized"
    made = compressed_tensors.CompressedTensorsConfig.from_config(config)
    with rank_of(tp_size, 1):
        layer = linear.RowParallelLinear(576, 256)
        made.get_quant_method(layer, "model.layers.0.mlp.down_proj")
    named = [args[:5] for args in said]
    sizes = ("Row-parallel layers", 576, tp_size, 576 // tp_size, 16)
    assert named == ([sizes] if is_cut else [])


def channels():
    """Return a compressed-tensors config with one scale for each output."""
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors,
    )

    config = FORMATS["compressed-tensors"].config()
    (group,) = config["config_groups"].values()
    group["weights"] |= {"strategy": "channel", "block_structure": None}
    group["input_activations"] |= {"strategy": "token", "group_size": None}
    return compressed_tensors.CompressedTensorsConfig.from_config(config)


def online():
    """Return the config that quantizes weights in blocks after they were cut."""
    from vllm.config.quantization import resolve_quantization_config
    from vllm.model_executor.layers.quantization.online import base

    return base.OnlineQuantizationConfig(
        resolve_quantization_config("fp8_per_block", None)
    )


@pytest.mark.parametrize("make", [channels, online])
def test_what_has_no_groups_to_cut_is_stock_and_not_named(said, make):
    """Scales of whole outputs, and blocks that vLLM makes on each rank."""
    layer = experts.build(1536, TP, 1, quant_config=make)
    assert layer.moe_config.tp_size == TP
    sizes = {"input_size": 1536, "output_size": 256, "bias": False}
    row = build("RowParallelLinear", TP, 1, quant_config=make, **sizes)
    for each in (layer, row):
        assert type(each.quant_method).__module__.startswith("vllm.")
    assert said == []
