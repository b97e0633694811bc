"""Experts of other formats than plain FP8, on the real vLLM classes."""

import pytest
import torch

from tests.fp8_tp_padding import experts
from tests.fp8_tp_padding.experts import BLOCK, Checkpoint, padded, poison
from tests.fp8_tp_padding.moe_reference import reference
from tests.fp8_tp_padding.tensor_parallel import rank_of
from tests.fp8_tp_padding.test_moe_forward import EXPERTS, HIDDEN, TOKENS, routing

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


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("store", ["auto", "padded"])
def test_ranks_sum_to_the_reference(of_experts, monkeypatch, total, store):
    """On masked kernels, through the method, and on vLLM's."""
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


def through_the_method(layer, x, weights, ids):
    output = layer.quant_method.apply(
        layer, x, weights.clone(), ids.clone(), None, None
    )
    return output[0] if isinstance(output, tuple) else output


def through_stock_kernels(layer, x, weights, ids):
    """In float32: the method would have them round to bfloat16 in between."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    config = layer.quant_method.moe_quant_config
    return fused_experts(
        x, layer.w13_weight, layer.w2_weight, weights, ids, quant_config=config
    )


def test_sizes_that_keep_blocks_whole_are_stock(of_experts):
    layer = build(of_experts, 1024, TP, 1)
    assert not type(layer.quant_method).__module__.startswith("vllm_patch")


def test_stock_refuses_them(of_experts, monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "off")
    try:
        layer = build(of_experts, 640, TP, 1)
    except (ValueError, NotImplementedError):
        return
    assert layer.quant_method.weight_block_size != [BLOCK, BLOCK], "then it refines"


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


def test_formats_that_nobody_pads_are_named(plugin, padding_log):
    """MXFP8 experts of 80 columns: two and a half groups."""
    from vllm_patch.formats.checkpoint_format import CheckpointFormat

    class SomeMxfp8MoEMethod:
        pass

    layer = experts.build(640, TP, 1)
    layer.moe_config.fp8_tp_shard = None
    mxfp8 = CheckpointFormat(lambda _: None, lambda _: None, lambda _, method: method)
    for tp_size, warns in ((TP, True), (4, False)):
        padding_log().clear()
        layer = experts.build(640, tp_size, 1)
        method = mxfp8.quant_method(
            lambda *_: SomeMxfp8MoEMethod(), None, layer, "experts"
        )
        assert isinstance(method, SomeMxfp8MoEMethod)
        lines = [r.getMessage() for r in padding_log()]
        said = any("80 columns cut the groups of 32 of SomeMxfp8" in x for x in lines)
        assert said or not warns
