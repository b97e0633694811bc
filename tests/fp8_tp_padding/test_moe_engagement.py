"""Which layers get the padded method, and that all others stay stock."""

import logging

import pytest
import torch

from vllm_patch import block_shard

from . import experts
from .experts import Checkpoint, build, load

BACKENDS = (
    "auto",
    "triton",
    "deep_gemm",
    "cutlass",
    "flashinfer_trtllm",
    "flashinfer_cutlass",
    "marlin",
    "humming",
)


def method_class(layer) -> type:
    return type(layer.quant_method)


@pytest.fixture
def stock_class():
    from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod

    return Fp8MoEMethod


def build_stock(*args, **kwargs):
    from vllm_patch import plugin

    plugin.unregister()
    try:
        return build(*args, **kwargs)
    finally:
        plugin.register()


@pytest.mark.parametrize(
    ("total", "tp_size", "kwargs"),
    [
        (1536, 4, {}),  # 384 columns: whole blocks
        (1536, 1, {}),
        (1536, 8, {"weight_block_size": None}),  # per-tensor scales
    ],
)
def test_other_layers_are_stock(plugin, stock_class, total, tp_size, kwargs):
    layer, stock = (make(total, tp_size, 0, **kwargs) for make in (build, build_stock))
    assert method_class(layer) is stock_class
    assert layer.quant_method.experts_cls is stock.quant_method.experts_cls
    assert vars(layer.moe_config) == vars(stock.moe_config)
    assert [(n, p.shape, p.dtype) for n, p in layer.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in stock.named_parameters()
    ]
    for param, stock_param in zip(layer.parameters(), stock.parameters(), strict=True):
        assert param.weight_loader.__func__ is stock_param.weight_loader.__func__


@pytest.mark.parametrize(
    "eplb", [{}, {"enable_eplb": True, "num_redundant_experts": 8}]
)
def test_expert_parallelism_is_stock(plugin, stock_class, eplb):
    """Even where whole experts end inside a block, as 704 columns do."""
    kwargs = {"expert_parallel": True, "experts": 8, **eplb}
    assert method_class(build(1536, 8, 0, **kwargs)) is stock_class
    assert outcome(build, total=704, **kwargs) == outcome(
        build_stock, total=704, **kwargs
    )


def test_an_aligned_layer_holds_the_same_bytes(plugin):
    checkpoint = Checkpoint.random(1536)
    layer, stock = build(1536, 4, 3), build_stock(1536, 4, 3)
    for each in (layer, stock):
        load(each, checkpoint)
        experts.process(each, 4, 3)
    for (name, param), stock_param in zip(
        layer.named_parameters(), stock.parameters(), strict=True
    ):
        assert torch.equal(
            param.data.view(torch.uint8), stock_param.data.view(torch.uint8)
        ), name


def test_experts_that_are_not_quantized_stay_so(plugin, monkeypatch):
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization import fp8

    monkeypatch.setattr(fp8, "is_layer_skipped", lambda **kwargs: True)
    layer = build(1536, 8, 3)
    assert isinstance(layer.quant_method, UnquantizedFusedMoEMethod)
    assert layer.moe_config.intermediate_size_per_partition == 192
    assert layer.moe_config.intermediate_size_per_partition_unpadded == 192


def test_off_is_stock(plugin, stock_class, monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "off")
    if experts.vllm_version() < (0, 29):
        with pytest.raises(ValueError, match="192 is not divisible by"):
            build(1536, 8, 3)
        return
    layer = build(1536, 8, 3)
    assert method_class(layer) is stock_class
    assert layer.quant_method.moe_block_shape == [64, 64]


def test_masked_experts_are_for_our_method_only(plugin, stock_class, monkeypatch):
    """A config that makes vLLM's method itself gets vLLM's experts."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    made = []

    def make(self, layer, prefix):
        made.append(stock_class(self, layer))
        return made[0]

    monkeypatch.setattr(Fp8Config, "get_quant_method", make)
    outcome(build, total=640, backend="triton")
    assert made[0].experts_cls.__name__ == "TritonExperts"


def test_our_method_replaces_refined_blocks(plugin, stock_class):
    layer = build(1536, 8, 3)
    assert issubclass(method_class(layer), stock_class)
    assert method_class(layer) is not stock_class
    method = layer.quant_method
    assert method.block_shard == block_shard(1536, 128, 3, 8)
    assert getattr(method, "weight_scale_refine", None) is None
    assert getattr(method, "moe_block_shape", [128, 128]) == [128, 128]
    moe = layer.moe_config
    assert not getattr(moe, "tp_shard_with_padding", False)
    # Backends that know the unpadded size take the padding to be at the end.
    assert moe.intermediate_size_per_partition == 256
    assert moe.intermediate_size_per_partition_unpadded == 256


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernel_is_the_one_stock_takes_for_the_padded_shape(
    plugin, backend, monkeypatch
):
    """1536 / 8 = 192 becomes 256: what stock chooses for 2048 / 8."""
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "padded")

    def choice(total):
        try:
            method = build(total, 8, 3, backend=backend).quant_method
        except (ValueError, NotImplementedError) as error:
            return type(error), str(error)
        return method.fp8_backend, method.experts_cls

    assert choice(1536) == choice(2048)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"hidden": 320}, "hidden size 320 is not a multiple of 128 either"),
        ({"weight_block_size": (128, 64)}, "the blocks are not square"),
    ],
)
def test_what_cannot_be_padded_is_left_to_stock(
    plugin, stock_class, padding_log, kwargs, reason
):
    from vllm_patch.fp8_tp_padding.methods.experts import CutFp8MoEMethod

    assert outcome(build, **kwargs) is not CutFp8MoEMethod
    assert outcome(build, **kwargs) == outcome(build_stock, **kwargs)
    assert any(reason in record.getMessage() for record in padding_log())


def test_experts_with_a_loader_of_their_own_are_left_to_stock(plugin, padding_log):
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm_patch.fp8_tp_padding.methods.experts import is_left_to_stock

    class Others(RoutedExperts):
        def weight_loader(self, *args, **kwargs):
            raise AssertionError("not called")

    layer = build(1536, 8, 3)
    assert not is_left_to_stock([128, 128], layer)
    layer.__class__ = Others
    assert is_left_to_stock([128, 128], layer)
    (line,) = padding_log()
    assert "Others loads weights in a way of its own" in line.getMessage()


def outcome(make, total=1536, **kwargs):
    try:
        return type(make(total, 8, 0, **kwargs).quant_method)
    except ValueError as error:
        return str(error).splitlines()[0]


def test_one_line_says_what_was_padded(plugin, padding_log, monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "padded")
    layers = [build(640, 8, 0, experts=4, hidden=512) for _ in range(3)]
    for layer in layers:
        experts.process(layer, 8, 0)
    (line,) = padding_log()
    assert line.levelno == logging.INFO
    added = 3 * 3 * 4 * 512 * (256 - 80) / 2**20
    assert (
        "3 MoE layers, 640 / TP 8 = 80 padded to 128 or 256 (VLLM_FP8_TP_PADDING="
        f"padded); {added:.1f} MiB of padding on the largest rank. "
        "VLLM_FP8_TP_PADDING=off"
    ) in line.getMessage()


def test_other_ranks_say_nothing(plugin, padding_log):
    experts.process(build(640, 8, 3), 8, 3)
    assert not padding_log()


COMPACT = "1 MoE layers, 384 / TP 2 = 192 stored compact, for masked Triton kernels"
PADDED = "1 MoE layers, 384 / TP 2 = 192 padded to 256 (VLLM_FP8_TP_PADDING=padded)"
ADDED = "0.1 MiB of padding on the largest rank"


@pytest.mark.parametrize(
    ("modes", "parts"),
    [
        (["auto"], [COMPACT]),
        (["padded"], [PADDED, ADDED]),
        (["auto", "padded"], [COMPACT, PADDED, ADDED]),
    ],
    ids=["compact", "padded", "some of both"],
)
def test_the_log_line_says_what_is_stored_and_why(
    monkeypatch, padding_log, modes, parts
):
    """It speaks of padding only where there is some."""
    checkpoint = Checkpoint.random(384)
    layers = []
    for mode in modes:
        monkeypatch.setenv("VLLM_FP8_TP_PADDING", mode)
        layers.append(build(384, 2, 0))
        load(layers[-1], checkpoint)
    for layer in layers:
        experts.process(layer, 2, 0)
    (line,) = padding_log()
    assert line.getMessage() == (
        f"FP8 layers cut inside quant blocks: {'; '.join(parts)}. "
        "VLLM_FP8_TP_PADDING=off goes back to stock vLLM."
    )
