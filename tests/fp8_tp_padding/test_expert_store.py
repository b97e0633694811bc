# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which experts are stored without padding, and what they hold then."""

import pytest
import torch

from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels import (
    masked_experts,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.methods.store import (
    Compact,
    Padded,
    store_for,
)

from . import experts
from .experts import Checkpoint, build, load, poison
from .moe_reference import ACTIVATIONS
from .tensor_parallel import runs_kernels
from .test_moe_loading import SPLITS

pytestmark = runs_kernels

CUT = [(total, tp) for total, tp in SPLITS if total // tp % experts.BLOCK]


def stored(layer, shard):
    """Weight of ``shard`` with its sharded dimension last, and its scales."""
    stem = experts.SHARDS[shard]
    weight = getattr(layer, f"{stem}_weight").data
    scale = getattr(layer, f"{stem}_weight_scale_inv").data
    if shard == "w2":
        return weight, scale
    index = 1 if shard == "w3" else 0
    return (t.chunk(2, 1)[index].transpose(1, 2) for t in (weight, scale))


@pytest.mark.parametrize(("total", "tp_size"), CUT)
def test_ranks_rebuild_the_checkpoint_without_padding(total, tp_size):
    checkpoint = Checkpoint.random(total)
    size = total // tp_size
    for rank in range(tp_size):
        layer = build(total, tp_size, rank)
        if layer.quant_method.store != Compact():
            assert "blocks a rank" in layer.quant_method.store.because
            continue
        poison(layer)
        load(layer, checkpoint)
        lead = rank * size % experts.BLOCK
        for shard in experts.SHARDS:
            weight, scale = stored(layer, shard)
            assert weight.shape[-1] == size
            whole = checkpoint.weights[shard].view(torch.uint8)
            blocks = checkpoint.scales[shard]
            if shard != "w2":
                whole, blocks = whole.transpose(1, 2), blocks.transpose(1, 2)
            mine = slice(rank * size, (rank + 1) * size)
            assert torch.equal(weight.view(torch.uint8), whole[..., mine])
            position = lead + torch.arange(size)
            found = scale[..., position // experts.BLOCK]
            element = rank * size + torch.arange(size)
            assert torch.equal(found, blocks[..., element // experts.BLOCK])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_without_padding(name):
    layer = build(384, 2, 1, **ACTIVATIONS[name].kwargs)
    assert layer.quant_method.store == Compact()


def test_a_wide_rank_is_padded():
    layer = build(1408, 2, 1)
    assert layer.quant_method.store == Padded(
        "masked kernels take up to 4 blocks a rank, not 6"
    )
    assert layer.w2_weight.shape[-1] == 768


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("VLLM_FP8_TP_PADDING", "padded", "VLLM_FP8_TP_PADDING=padded"),
        ("VLLM_BATCH_INVARIANT", "1", "masked kernels depend on the batch size"),
    ],
)
def test_variables_keep_the_padded_store(monkeypatch, variable, value, reason):
    monkeypatch.setenv(variable, value)
    layer = build(384, 2, 1)
    assert layer.quant_method.store == Padded(reason)
    assert layer.w2_weight.shape[-1] == 256


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"has_bias": True}, "masked kernels add no biases"),
        ({"dp": (2, 0)}, "masked kernels quantize after the dispatch, not before it"),
        ({"activation": "gelu"}, "masked kernels do not compute gelu"),
        ({"weight_block_size": (64, 64)}, "masked kernels take blocks of 128, not 64"),
        ({"weight_block_size": (32, 32)}, "masked kernels take blocks of 128, not 32"),
    ],
)
def test_what_masked_kernels_do_not_compute_is_padded(kwargs, reason):
    layer = build(288, 2, 1, **kwargs)
    assert layer.quant_method.store == Padded(reason)


def test_a_layer_without_a_kernel_says_so():
    """And blames no padding for it: some platforms stop later."""
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend

    store = store_for(None, Fp8MoeBackend.NONE, build(384, 2, 1).moe_config)
    assert store == Padded("vLLM has no kernel for them here")


@pytest.mark.parametrize("refused", ["platform", "format", "key"])
def test_vllms_choice_may_refuse_masked_experts(monkeypatch, refused):
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.quantization.utils import quant_utils

    keys = [quant_utils.kFp8Static128BlockSym, quant_utils.kFp8Dynamic128Sym]
    formats = [mk.FusedMoEActivationFormat.Standard]
    config = build(384, 2, 1).moe_config

    def supported():
        masked = masked_experts.MaskedTritonExperts
        return masked.is_supported_config(masked, config, *keys, *formats)

    assert supported() == (True, None)
    if refused == "platform":
        platform = masked_experts.current_platform
        monkeypatch.setattr(platform, "is_cuda", lambda: False)
    elif refused == "format":
        formats[0] = mk.FusedMoEActivationFormat.BatchedExperts
    else:
        keys[0] = quant_utils.kFp8StaticTensorSym
    is_supported, reason = supported()
    assert not is_supported and reason
