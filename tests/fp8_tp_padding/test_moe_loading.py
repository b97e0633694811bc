# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Experts on the real vLLM classes: what the padded parameters hold."""

import dataclasses
import gc
from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.quantization.fp8_tp_padding.loading import (
    sliced_tensor,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.methods import (
    experts as methods,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.slices.shard import (
    block_shard,
)

from . import experts
from .experts import Checkpoint, build, load, padded, poison, vllm_version

TOTALS = (
    384,  # smallest that cuts a block at TP 2
    512,  # Qwen3-Next: 64, 32 per rank
    640,  # 160, 80, 40 per rank: blocks of five, straddled
    768,  # Qwen3-30B-A3B: 192, 96
    1408,  # GLM-4.5-Air: 704, 352, 176, 88, the largest leads
    1536,  # Qwen3-235B: 192
    2560,  # Qwen3-Coder-480B: 320
    3072,  # DeepSeek-V4: 192 at TP 16
)
TP_SIZES = (2, 4, 8, 16)
SPLITS = [(total, tp) for total in TOTALS for tp in TP_SIZES if total % tp == 0]
# The checkpoint's own last block is partial.
SPLITS += [(704, 1), (704, 2), (704, 8)]


@pytest.fixture(autouse=True)
def padded_store(monkeypatch):
    """Keep whole blocks, as for any kernel but the masked ones."""
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "padded")


def columns(weight: torch.Tensor, shard: str) -> torch.Tensor:
    """View a weight with its sharded dimension last."""
    return weight if shard == "w2" else weight.transpose(-1, -2)


def method_name(layer) -> str:
    return type(layer.quant_method).__name__


def check_that_ranks_rebuild(checkpoint: Checkpoint, total: int, tp_size: int) -> None:
    rebuilt = {s: torch.empty_like(checkpoint.dequantized(s)) for s in experts.SHARDS}
    size = total // tp_size
    cut = size % experts.BLOCK != 0
    for rank in range(tp_size):
        layer = build(total, tp_size, rank)
        assert method_name(layer) == ("CutFp8MoEMethod" if cut else "Fp8MoEMethod")
        poison(layer)
        load(layer, checkpoint)
        start = rank * size
        lead = start % experts.BLOCK
        real = slice(lead, lead + size)
        for shard, whole in rebuilt.items():
            weight, scale = padded(layer, shard)
            mine = columns(experts.dequantize(weight, scale), shard)
            columns(whole, shard)[..., start : start + size] = mine[..., real]
            codes = columns(weight.view(torch.uint8), shard).clone()
            codes[..., real] = 0
            assert not codes.any(), "padding must be zero"
            assert torch.isfinite(scale).all(), "scales must be finite"
    for shard, whole in rebuilt.items():
        assert torch.equal(whole, checkpoint.dequantized(shard)), shard


@pytest.mark.parametrize(("total", "tp_size"), SPLITS)
def test_ranks_rebuild_the_checkpoint_exactly(total, tp_size):
    check_that_ranks_rebuild(Checkpoint.random(total), total, tp_size)


@pytest.mark.parametrize(("total", "tp_size"), [(1536, 8), (640, 8), (1408, 8)])
def test_the_check_sees_padding_at_the_tail_only(monkeypatch, total, tp_size):
    """What everyone tries first; wrong for each rank that starts inside a block."""

    def tail_only(*args):
        return dataclasses.replace(block_shard(*args), lead=0)

    monkeypatch.setattr(methods, "block_shard", tail_only)
    with pytest.raises(AssertionError):
        check_that_ranks_rebuild(Checkpoint.random(total), total, tp_size)


def test_the_check_sees_padding_left_uninitialised(monkeypatch):
    def load_real_part_only(self, data, tensor):
        slot = self.slot(data)
        for dim, window in enumerate(self.windows):
            slot = slot.narrow(dim, window.lead, window.size)
            tensor = tensor.narrow(dim, window.start, window.size)
        slot.copy_(tensor)

    monkeypatch.setattr(sliced_tensor.SlicedTensor, "load", load_real_part_only)
    with pytest.raises(AssertionError, match="padding must be zero"):
        check_that_ranks_rebuild(Checkpoint.random(1536), 1536, 8)


def stored(layer) -> dict[str, torch.Tensor]:
    return {
        name: param.data.clone().view(torch.uint8)
        for name, param in layer.named_parameters()
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


# Rank 1 of 1536 / 8 leads with 64 columns; rank 5 of 1408 / 8 with 112.
LEADING = [(1536, 8, 1), (1408, 8, 5)]


@pytest.mark.parametrize(("total", "tp_size", "rank"), LEADING)
def test_a_reload_over_dirty_parameters_gives_the_same_bytes(total, tp_size, rank):
    checkpoint = Checkpoint.random(total)
    layer = build(total, tp_size, rank)
    load(layer, checkpoint)
    experts.process(layer, tp_size, rank)
    first = stored(layer)
    poison(layer)
    load(layer, checkpoint)
    experts.process(layer, tp_size, rank)
    assert same(stored(layer), first)


def test_vllm_reloads_layer_by_layer():
    """The way of reinforcement learning: vLLM counts elements to know the end."""
    from vllm.model_executor.model_loader import reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    checkpoint, other = Checkpoint.random(1536), Checkpoint.random(1536, seed=1)
    fresh = build(1536, 8, 1)
    load(fresh, other)
    experts.process(fresh, 8, 1)

    model = torch.nn.Module()
    layer = model.experts = build(1536, 8, 1)
    reload.record_metadata_for_reloading(model)
    load(layer, checkpoint)
    experts.process(layer, 8, 1)
    addresses = {name: p.data_ptr() for name, p in layer.named_parameters()}
    with experts.rank_of(8, 1) as config:
        reload.initialize_layerwise_reload(model)
        load(layer, other)
        # Complete without the fallback for layers that got too few elements.
        assert not get_layerwise_info(layer).can_load()
        reload.finalize_layerwise_reload(model, config.model_config)
    assert same(stored(layer), stored(fresh))
    assert addresses == {name: p.data_ptr() for name, p in layer.named_parameters()}


def test_reloads_keep_nothing():
    """Twenty updates, as reinforcement learning makes them for days."""
    from vllm.model_executor.model_loader import reload

    model, checkpoint = torch.nn.Module(), Checkpoint.random(384)
    layer = model.experts = build(384, 2, 1)
    reload.record_metadata_for_reloading(model)
    load(layer, checkpoint)
    experts.process(layer, 2, 1)
    alive = []
    for _ in range(20):
        with experts.rank_of(2, 1) as config:
            reload.initialize_layerwise_reload(model)
            load(layer, checkpoint)
            reload.finalize_layerwise_reload(model, config.model_config)
        gc.collect()
        alive.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert alive[-1] == alive[1]


def test_an_update_that_misses_a_tensor_is_noticed_each_time():
    layer, checkpoint = build(384, 2, 1), Checkpoint.random(384)
    for _ in range(2):
        load(layer, checkpoint)
        experts.process(layer, 2, 1)
    del checkpoint.weights["w2"]
    for _ in range(2):
        load(layer, checkpoint)
        with pytest.raises(ValueError, match="w2_weight of expert 0 .w2. is missing"):
            experts.process(layer, 2, 1)


@pytest.mark.parametrize(("total", "tp_size", "rank"), LEADING)
def test_fused_tensors_load_like_single_experts(total, tp_size, rank):
    checkpoint = Checkpoint.random(total, experts=3)
    single, fused = (build(total, tp_size, rank, experts=3) for _ in range(2))
    poison(fused)
    load(single, checkpoint)
    load(fused, checkpoint, fused=True)
    assert same(stored(single), stored(fused))


@pytest.mark.parametrize("fused", [False, True])
def test_checkpoint_names_reach_the_padded_loaders(fused):
    if fused and vllm_version() < (0, 28):
        pytest.skip("this release turns fused block scales on their side")
    checkpoint = Checkpoint.random(1536)
    expected, layer = (build(1536, 8, 3) for _ in range(2))
    load(expected, checkpoint)
    poison(layer)
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    weights = []
    for suffix, tensors in (
        ("weight", checkpoint.weights),
        ("weight_scale_inv", checkpoint.scales),
    ):
        if fused:
            # Fused checkpoints name the tensor without a module: ``_scale_inv``.
            end = "" if suffix == "weight" else "_scale_inv"
            gate_up = torch.cat([tensors["w1"], tensors["w3"]], dim=1)
            weights += [(f"gate_up_proj{end}", gate_up)]
            weights += [(f"down_proj{end}", tensors["w2"])]
            continue
        weights += [
            (f"{expert}.{names[shard]}.{suffix}", tensor)
            for shard, stacked in tensors.items()
            for expert, tensor in enumerate(stacked)
        ]
    loaded = list(layer.load_weights(iter(weights)))
    assert len(set(loaded)) == 4
    assert same(stored(layer), stored(expected))


def test_experts_without_a_gate():
    if vllm_version() < (0, 28):
        pytest.skip("this release has no block-FP8 experts without a gate")
    checkpoint = Checkpoint.random(1536, gated=False)
    layer = build(1536, 8, 5, **experts.ungated())
    assert method_name(layer) == "CutFp8MoEMethod"
    poison(layer)
    load(layer, checkpoint)
    weight, scale = padded(layer, "w1")
    mine = experts.dequantize(weight, scale)[:, 64:]
    assert weight.shape[1] == 256
    assert torch.equal(mine, checkpoint.dequantized("w1")[:, 960:1152])


def test_expert_biases_are_padded_with_zeros():
    layer = build(1536, 8, 3, has_bias=True)
    poison(layer)
    bias = torch.arange(1, 1537, dtype=torch.bfloat16)
    for index, shard in enumerate(("w1", "w3")):
        assert experts.load_tensor(layer, "w13_bias", bias, shard, 1)
        slot = layer.w13_bias[1].chunk(2)[index]
        assert torch.equal(slot[64:], bias[576:768])
        assert not slot[:64].any()


def test_the_bias_of_down_counts_once_over_all_ranks():
    bias = torch.randn(256).bfloat16()
    for rank in range(8):
        layer = build(1536, 8, rank, has_bias=True)
        poison(layer)
        assert experts.load_tensor(layer, "w2_bias", bias, "w2", 1)
        expected = bias if rank == 0 else torch.zeros_like(bias)
        assert torch.equal(layer.w2_bias[1], expected)


def test_biases_may_be_missing():
    layer = build(1536, 8, 3, has_bias=True)
    load(layer, Checkpoint.random(1536))
    experts.process(layer, 8, 3)


def test_ranks_are_flattened_over_data_parallelism():
    """TP 4 x DP 2 splits experts in eight; rank 1 of the second engine is rank 5."""
    checkpoint = Checkpoint.random(1536)
    layer, expected = build(1536, 4, 1, dp=(2, 1)), build(1536, 8, 5)
    load(layer, checkpoint)
    load(expected, checkpoint)
    assert layer.quant_method.block_shard == block_shard(1536, 128, 5, 8)
    assert same(stored(layer), stored(expected))


def test_loaders_may_take_their_tensors_back():
    """As fastsafetensors does, whose buffers hold one file after the other."""
    checkpoint = Checkpoint.random(1536)
    layer, expected = build(1536, 8, 1), build(1536, 8, 1)
    load(expected, checkpoint)
    load(layer, checkpoint)
    for tensors in (checkpoint.weights, checkpoint.scales):
        for tensor in tensors.values():
            tensor.view(torch.uint8).fill_(1)
    assert same(stored(layer), stored(expected))


def test_dummy_weights_need_no_checkpoint():
    layer = build(1536, 8, 1)
    for param in layer.parameters():
        param.data.view(torch.uint8).fill_(1)
    experts.process(layer, 8, 1)


@pytest.mark.parametrize("saved_as", ["padded", "auto"])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_sharded_state_must_be_of_the_same_store(monkeypatch, saved_as, rank):
    """VLLM copies what it finds to the start of a larger parameter."""
    load_config = SimpleNamespace(load_format="sharded_state")
    config = SimpleNamespace(load_config=load_config)
    monkeypatch.setattr(sliced_tensor, "get_current_vllm_config", lambda: config)
    layer = build(1536, 8, rank)
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", saved_as)
    saved = build(1536, 8, rank)
    load(saved, Checkpoint.random(1536))
    for name, param in layer.named_parameters():
        param.data.view(torch.uint8).fill_(1)
        part = param.data
        for dim, size in enumerate(getattr(saved, name).shape):
            part = part.narrow(dim, 0, size)
        part.copy_(getattr(saved, name).data)
    if saved_as == "padded":
        experts.process(layer, 8, rank)
        return
    with pytest.raises(ValueError, match="weights where the padding of this rank"):
        experts.process(layer, 8, rank)


def test_sparse_updates_keep_what_is_nan():
    """VLLM 0.29+: an update has NaN for values that stay, in weights and scales."""
    if vllm_version() < (0, 29):
        pytest.skip("this release has no sparse weight updates")
    from vllm.model_executor.model_loader import checkpoint_weight_patch as sparse

    checkpoint = Checkpoint.random(1536)
    layer = build(1536, 8, 3)
    load(layer, checkpoint)
    before = stored(layer)

    class Model:
        def load_weights(self, weights):
            for name, tensor in weights:
                experts.load_tensor(layer, name, tensor, "w1", 0)

    update = torch.full((12, 2), float("nan"))
    update[4, 1] = 7.0  # Rank 3 starts in block 4.
    sparse._load_nan_masked_weights(Model(), [("w13_weight_scale_inv", update)])
    scale = layer.w13_weight_scale_inv.data
    assert scale[0, 0, 1] == 7.0
    scale[0, 0, 1] = checkpoint.scales["w1"][0, 4, 1]
    assert same(stored(layer), before)
