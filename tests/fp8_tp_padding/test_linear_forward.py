# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What padded linear layers compute, on the real vLLM classes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .exact import activations, matrix
from .experts import dequantize, poison
from .tensor_parallel import rank_of, runs_kernels
from .test_linear_loading import (
    HIDDEN,
    build,
    linear_reference,
    load,
    merged,
    method_name,
    run,
)

pytestmark = runs_kernels

TP = 8
# Per rank: half a block; more than half, so that ranks straddle; two blocks and a
# bit, after which the checkpoint's last block is partial.
SIZES = (512, 640, 2200)


def rows_of(total: int, rank: int) -> slice:
    return slice(rank * total // TP, (rank + 1) * total // TP)


@pytest.mark.parametrize("rank", range(TP))
@pytest.mark.parametrize("total", SIZES)
def test_column_parallel(total, rank):
    weight, scale = matrix(total, HIDDEN, seed=0)
    sizes = {"input_size": HIDDEN, "output_size": total}
    layer = build("ColumnParallelLinear", TP, rank, torch.float32, **sizes)
    mine = rows_of(total, rank)
    bias = torch.arange(float(total))
    poison(layer)
    load(layer, {None: (weight, scale)})
    layer.bias.weight_loader(layer.bias, bias)
    x = activations(3, HIDDEN)
    y = run(layer, x, TP, rank)
    expected = linear_reference(x, weight, scale)[:, mine] + bias[mine]
    assert y.is_contiguous()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("rank", range(TP))
@pytest.mark.parametrize("total", SIZES)
def test_merged_column_parallel(total, rank):
    """Unequal shards, of which one is aligned."""
    totals = [total, 1024, 2 * total]
    tensors = {i: matrix(size, HIDDEN, seed=i) for i, size in enumerate(totals)}
    layer = merged(TP, rank, totals, dtype=torch.float32)
    poison(layer)
    load(layer, tensors)
    x = activations(3, HIDDEN)
    expected = torch.cat(
        [
            linear_reference(x, *tensors[i])[:, rows_of(size, rank)]
            for i, size in enumerate(totals)
        ],
        -1,
    )
    y = run(layer, x, TP, rank)
    assert y.is_contiguous()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("total", SIZES)
def test_row_parallel_sums_to_the_whole(total):
    """Each rank adds what its columns are worth, and the bias comes once."""
    weight, scale = matrix(HIDDEN, total, seed=0)
    bias = torch.arange(float(HIDDEN)) / 16
    x = activations(3, total)
    summed, expected = torch.zeros(3, HIDDEN), bias.repeat(3, 1)
    for rank in range(TP):
        sizes = {"input_size": total, "output_size": HIDDEN}
        layer = build("RowParallelLinear", TP, rank, torch.float32, **sizes)
        poison(layer)
        load(layer, {None: (weight, scale)})
        layer.bias.weight_loader(layer.bias, bias)
        mine = rows_of(total, rank)
        expected += of_columns(mine, x, weight, scale)
        summed += run(layer, x[:, mine], TP, rank)
    assert torch.equal(summed, expected)


def of_columns(mine: slice, x, weight, scale):
    """Return what these columns are worth, in groups of the checkpoint's grid."""
    alone = torch.zeros_like(x)
    alone[:, mine] = x[:, mine]
    return linear_reference(pad_to_blocks(alone), *padded(weight, scale))


def pad_to_blocks(tensor):
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % 128))


def padded(weight, scale):
    return pad_to_blocks(weight.view(torch.uint8)).view(weight.dtype), scale


@pytest.mark.parametrize("rank", [3, 0])
def test_a_layer_without_tensor_parallelism_that_ends_inside_a_block(rank):
    """Every rank holds all of it; what comes after a partial shard is moved."""
    tensors = {0: matrix(192, HIDDEN, 0), 1: matrix(320, HIDDEN, 1)}
    layer = merged(TP, rank, [192, 320], dtype=torch.float32, disable_tp=True)
    assert method_name(layer) == "CutFp8LinearMethod"
    poison(layer)
    load(layer, tensors)
    x = activations(3, HIDDEN)
    expected = torch.cat([linear_reference(x, *t) for t in tensors.values()], -1)
    assert torch.equal(run(layer, x, TP, rank), expected)


@pytest.mark.parametrize("rank", [5, 4])
@pytest.mark.parametrize("kind", ["RowParallelLinear", "ColumnParallelLinear"])
def test_scales_that_are_powers_of_two(monkeypatch, kind, rank):
    """As DeepSeek-V4 stores them: float8_e8m0fnu."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    monkeypatch.setattr(Fp8Config, "is_scale_e8m0", True, raising=False)
    is_row, total = kind.startswith("Row"), 640
    shape = (HIDDEN, total) if is_row else (total, HIDDEN)
    weight, scale = matrix(*shape, seed=0)
    scale = torch.exp2(scale.log2().round()).to(torch.float8_e8m0fnu)
    inputs, outputs = reversed(shape)
    sizes = {"input_size": inputs, "output_size": outputs, "bias": False}
    layer = build(kind, TP, rank, torch.float32, **sizes)
    assert layer.weight_scale_inv.dtype == torch.float8_e8m0fnu
    poison(layer)
    load(layer, {None: (weight, scale)})
    mine = rows_of(total, rank)
    # vLLM 0.26's Triton kernel does not take these scales: look at the weights.
    with rank_of(TP, rank, torch.float32):
        layer.quant_method.process_weights_after_loading(layer)
    lead = mine.start % 128
    stored = dequantize(layer.weight.data, layer.weight_scale_inv.data.float())
    stored = stored.T if is_row else stored
    whole = dequantize(weight, scale.float())
    whole = whole.T if is_row else whole
    assert torch.equal(stored[lead : lead + total // TP], whole[mine])


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_row_parallel_padding_adds_no_operator():
    """The quantization of the input does it."""
    names = []
    for total in (640, 1024):
        sizes = {"input_size": total, "output_size": HIDDEN, "bias": False}
        layer = build("RowParallelLinear", TP, 1, **sizes)
        load(layer, {None: matrix(HIDDEN, total, seed=0)})
        x = torch.ones(3, total // TP, dtype=torch.bfloat16)
        run(layer, x, TP, 1)
        with Operators() as operators:
            layer.quant_method.apply(layer, x)
        names.append([name for name in operators.names if "empty" not in name])
    assert len(names[0]) == len(names[1])
