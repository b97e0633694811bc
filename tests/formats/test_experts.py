"""Experts of other formats than plain FP8, on the real vLLM classes."""

import pytest
import torch

from tests.fp8_tp_padding import experts
from tests.fp8_tp_padding.experts import BLOCK, Checkpoint, padded, poison
from tests.fp8_tp_padding.moe_reference import reference
from tests.fp8_tp_padding.tensor_parallel import rank_of
from tests.fp8_tp_padding.test_moe_forward import (
    EXPERTS,
    HIDDEN,
    TOKENS,
    routing,
    through_stock_kernels,
    through_the_method,
)

from .configs import FORMATS

# A block and a half; five blocks on eight ranks, straddled; eleven, odd leads.
TOTALS = (1536, 640, 1408)
TP = 8


def build(checkpoint_format, total, tp_size, rank, **kwargs):
    make = checkpoint_format.quant_config
    return experts.build(total, tp_size, rank, quant_config=make, **kwargs)


@pytest.mark.parametrize("total", TOTALS)
def test_ranks_rebuild_the_checkpoint_exactly(of_experts, monkeypatch, total):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "padded")
    checkpoint = Checkpoint.random(total)
    rebuilt = {s: torch.empty_like(checkpoint.dequantized(s)) for s in experts.SHARDS}
    size = total // TP
    for rank in range(TP):
        layer = build(of_experts, total, TP, rank)
        assert type(layer.quant_method).__name__ == of_experts.cut_experts
        poison(layer)
        experts.load(layer, checkpoint, scale_name=of_experts.scale)
        real = slice(rank * size % BLOCK, rank * size % BLOCK + size)
        for shard, whole in rebuilt.items():
            weight, scale = padded(layer, shard, of_experts.scale)
            dim = 2 if shard == "w2" else 1
            whole.narrow(dim, rank * size, size).copy_(
                experts.dequantize(weight, scale).narrow(dim, real.start, size)
            )
            codes = weight.view(torch.uint8).clone()
            codes.narrow(dim, real.start, size).zero_()
            assert not codes.any(), "padding must be zero"
    for shard, whole in rebuilt.items():
        assert torch.equal(whole, checkpoint.dequantized(shard)), shard


@pytest.mark.parametrize("store", ["auto", "padded"])
def test_ranks_sum_to_the_reference(of_experts, monkeypatch, store):
    """On masked kernels, through the method, and on vLLM's."""
    total = 640
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", store)
    checkpoint = Checkpoint.exact(total, experts=EXPERTS, hidden=HIDDEN)
    inputs = routing()
    summed = torch.zeros(TOKENS, HIDDEN)
    call = {"auto": through_the_method, "padded": through_stock_kernels}[store]
    for rank in range(TP):
        sizes = {"experts": EXPERTS, "hidden": HIDDEN, "dtype": torch.float32}
        layer = build(of_experts, total, TP, rank, **sizes)
        is_compact = layer.w13_weight.shape[1] == 2 * (total // TP)
        assert is_compact == (store == "auto")
        poison(layer)
        experts.load(layer, checkpoint, scale_name=of_experts.scale)
        experts.process(layer, TP, rank, torch.float32)
        with rank_of(TP, rank, torch.float32):
            summed += call(layer, *inputs)
    reference(checkpoint, total, TP, *inputs).check(summed)


def test_sizes_that_keep_blocks_whole_are_stock(of_experts):
    layer = build(of_experts, 1024, TP, 1)
    assert not type(layer.quant_method).__module__.startswith("vllm_patch")


def test_stock_refuses_them(of_experts, monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "off")
    with pytest.raises((ValueError, NotImplementedError), match="divisible|NONE|block"):
        build(of_experts, 640, TP, 1)


def test_experts_that_are_not_quantized_are_stock(of_experts, monkeypatch):
    """Only vLLM knows: the format may have blocks elsewhere."""

    def without_experts():
        config = of_experts.quant_config()
        for name in ("ignore", "exclude_modules"):
            if hasattr(config, name):
                setattr(config, name, ["re:.*experts.*", f"{experts.PREFIX}*"])
        if hasattr(config, "quant_config"):
            config.quant_config["exclude"] = [experts.PREFIX]
        return config

    layer = experts.build(1536, TP, 1, quant_config=without_experts)
    assert "Unquantized" in type(layer.quant_method).__name__
    assert layer.moe_config.intermediate_size_per_partition == 192


def test_a_missing_scale_is_named(of_experts):
    layer = build(of_experts, 1536, TP, 1)
    checkpoint = Checkpoint.random(1536)
    checkpoint.scales["w2"] = checkpoint.scales["w2"][:1]
    experts.load(layer, checkpoint, scale_name=of_experts.scale)
    name = f"w2_{of_experts.scale} of expert 1 .w2. is missing"
    with pytest.raises(ValueError, match=name):
        experts.process(layer, TP, 1)


def test_vllm_does_not_see_cut_sizes_where_nothing_is_in_blocks(plugin):
    """A mixed config always says which blocks it would have."""
    mixed = FORMATS["modelopt-mixed"]
    if not mixed.is_in_release:
        pytest.skip("this release has no modelopt-mixed in FP8 blocks")

    def without_blocks():
        config = mixed.quant_config()
        config.quantized_layers = {"other": {"quant_algo": "NVFP4"}}
        return config

    layer = experts.build(1536, TP, 1, quant_config=without_blocks)
    assert layer.moe_config.intermediate_size_per_partition == 192
    assert not hasattr(layer.moe_config, "fp8_tp_shard")
