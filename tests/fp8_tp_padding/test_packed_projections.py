# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""in_proj_ba and in_proj_qkvz of Qwen3-Next and Qwen3.5, as vLLM makes them.

The published checkpoints leave in_proj_ba in bfloat16; others may not.
"""

import types

import pytest
import torch

from . import exact
from .experts import BLOCK, poison
from .tensor_parallel import rank_of, runs_kernels
from .test_linear_loading import HIDDEN, linear_reference, load, method_name, run

pytestmark = runs_kernels

TP = 8
# Qwen3-Next-80B-A3B and Qwen3.5-35B-A3B: keys, values, value heads.
KEYS, VALUES, HEADS = 16 * 128, 32 * 128, 32


def projection(rank: int, is_interleaved: bool, kind: str):
    """Return ``"ba"`` or ``"qkvz"`` of one rank."""
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as gdn
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    attention = types.SimpleNamespace(
        gqa_interleaved_layout=is_interleaved, maybe_disable_tp=lambda config: False
    )
    config = Fp8Config(
        is_checkpoint_fp8_serialized=True, weight_block_size=[BLOCK, BLOCK]
    )
    sizes = {"ba": [HEADS], "qkvz": [KEYS, VALUES]}[kind]
    make = getattr(gdn.QwenGatedDeltaNetAttention, f"create_{kind}_proj")
    with rank_of(TP, rank, torch.float32):
        layer = make(attention, HIDDEN, *sizes, config, f"in_proj_{kind}")
    poison(layer)
    return layer


def mine(tensor, rank):
    return tensor.chunk(TP, -1)[rank]


@pytest.mark.parametrize("rank", range(TP))
def test_in_proj_ba_of_qwen3_next(rank):
    """One tensor of half a block, of which a rank has eight rows."""
    weight, scale = exact.matrix(2 * HEADS, HIDDEN, seed=0)
    layer = projection(rank, True, "ba")
    assert method_name(layer) == "CutFp8LinearMethod"
    load(layer, {None: (weight, scale)})
    x = exact.activations(3, HIDDEN)
    expected = mine(linear_reference(x, weight, scale), rank)
    assert torch.equal(run(layer, x, TP, rank), expected)


@pytest.mark.parametrize("rank", range(TP))
@pytest.mark.parametrize("on_disk", ["apart", "then packed", "packed, then quantized"])
def test_in_proj_ba_of_qwen3_5(rank, on_disk):
    """Two tensors of a quarter of a block each; in some checkpoints, one."""
    tensors = {i: exact.matrix(HEADS, HIDDEN, seed=i) for i in range(2)}
    if on_disk == "packed, then quantized":
        tensors[1] = tensors[1][0], tensors[0][1]
    weight, scale = (torch.cat([t[i] for t in tensors.values()]) for i in range(2))
    packed = {None: (weight, scale if on_disk == "then packed" else scale[:1])}
    layer = projection(rank, False, "ba")
    assert method_name(layer) == "CutFp8LinearMethod"
    load(layer, tensors if on_disk == "apart" else packed)
    x = exact.activations(3, HIDDEN)
    expected = [mine(linear_reference(x, *t), rank) for t in tensors.values()]
    assert torch.equal(run(layer, x, TP, rank), torch.cat(expected, -1))


@pytest.mark.parametrize("is_interleaved", [True, False])
def test_in_proj_qkvz_is_stock(is_interleaved):
    """Heads have 128 columns, so whole heads are whole blocks."""
    assert method_name(projection(3, is_interleaved, "qkvz")) == "Fp8LinearMethod"
