# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The kernel that moves columns, against torch's indexing."""

import pytest
import torch

from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels import columns
from vllm.model_executor.layers.quantization.fp8_tp_padding.slices.window import Window

from .tensor_parallel import runs_kernels
from .test_linear_loading import HIDDEN, build, load, matrix, run

pytestmark = runs_kernels

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (lead, size, span) of each logical shard.
SHARDS = {
    "half a block": [(64, 64, 128)],
    # Rank 1 of gate_up with 9728 / 8 per rank: more columns than a program owns.
    "gate_up": [(64, 1216, 1280), (64, 1216, 1280)],
    # Unequal shards, the last of which is whole.
    "qkv": [(64, 192, 256), (0, 64, 128), (0, 128, 128)],
    "odd": [(5, 33, 128), (127, 2, 256), (0, 1, 128), (3, 300, 384)],
}


def windows_of(shards):
    return [Window(9 * size, size, size, lead, span) for lead, size, span in shards]


@pytest.fixture
def dirty(monkeypatch):
    """Make fresh memory NaN."""
    stock = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda *args, **kwargs: stock(*args, **kwargs).fill_(float("nan")),
    )


@pytest.fixture(params=["launched", "traced"])
def path(request, monkeypatch):
    """The kernel, or the operators that torch.compile sees."""
    if request.param == "traced":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def real_of(output, shards):
    index, offset = [], 0
    for lead, size, span in shards:
        index += range(offset + lead, offset + lead + size)
        offset += span
    return output[..., index]


def padded_output(tokens, shards, dtype):
    """Finite where columns are real; the rest must not be read."""
    span = sum(span for _, _, span in shards)
    output = torch.full((tokens, span), float("nan"), dtype=dtype)
    offset = 0
    for lead, size, span in shards:
        real = output[:, offset + lead : offset + lead + size]
        real.copy_(torch.randn(tokens, size) * torch.logspace(-3, 3, size))
        offset += span
    return output


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# One; two programs' and one more.
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_real_columns(dirty, path, shards, tokens, dtype, has_bias):
    output = padded_output(tokens, shards, dtype)
    expected, bias = real_of(output, shards), None
    if has_bias:
        bias = torch.randn(expected.shape[-1]).to(dtype)
        expected = expected + bias
    y = columns.RealColumns(windows_of(shards))(output, bias)
    assert y.is_contiguous() and y.dtype == dtype
    assert torch.equal(y, expected) and not y.isnan().any()


def test_a_bias_of_another_dtype(path):
    output, bias = torch.randn(3, 128).bfloat16(), torch.randn(64).float()
    y = columns.RealColumns(windows_of([(32, 64, 128)]))(output, bias)
    assert y.dtype == torch.float32
    assert torch.equal(y, output[:, 32:96] + bias)


@pytest.mark.parametrize("rows", ["a view of more", "transposed", "3-D"])
@pytest.mark.parametrize("name", ["gate_up", "qkv"])
def test_real_columns_of_any_strides(dirty, path, name, rows):
    shards = SHARDS[name]
    output = padded_output(6, shards, torch.bfloat16)
    if rows == "a view of more":
        output = torch.nn.functional.pad(output, (0, 40))[:, :-40]
    elif rows == "transposed":
        output = output.T.contiguous().T
    else:
        output = output.view(2, 3, -1)
    y = columns.RealColumns(windows_of(shards))(output)
    assert y.is_contiguous() and torch.equal(y, real_of(output, shards))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 17])
# The last one has more columns than a program owns.
@pytest.mark.parametrize(
    "shard", [(64, 64, 128), (96, 96, 256), (5, 301, 384), (70, 700, 896)]
)
def test_padded_columns(dirty, path, shard, tokens, dtype):
    lead, size, span = shard
    # A view of a larger tensor, whose other columns must not be read.
    whole = torch.full((tokens, size + 40), float("nan"), dtype=dtype)
    x = whole[:, 8 : 8 + size]
    x.copy_(torch.randn(tokens, size))
    y = columns.PaddedColumns(*windows_of([shard]))(x)
    assert y.is_contiguous()
    assert torch.equal(y, torch.nn.functional.pad(x, (lead, span - lead - size)))


def test_no_tokens(path):
    windows = windows_of(SHARDS["gate_up"])
    assert columns.RealColumns(windows)(torch.empty(0, 2560)).shape == (0, 2432)
    assert columns.PaddedColumns(windows[0])(torch.empty(0, 1216)).shape == (0, 1280)


def test_what_torch_compile_traces():
    """One graph, of torch's own operators."""
    shards = SHARDS["qkv"]
    real, pad = (
        columns.RealColumns(windows_of(shards)),
        columns.PaddedColumns(*windows_of(shards[:1])),
    )
    output = padded_output(3, shards, torch.bfloat16)
    bias = torch.randn(384).bfloat16()
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    def both(x):
        return pad(real(x, bias)[:, :192])

    torch._dynamo.reset()
    traced = torch.compile(both, backend=backend, fullgraph=True)(output)
    assert torch.equal(traced, both(output))
    assert len(graphs) == 1 and "torch.cat" in graphs[0] and "pad" in graphs[0]


@pytest.mark.parametrize("has_bias", [False, True])
def test_column_parallel_layers_launch_it_once(monkeypatch, has_bias):
    """For the columns and the bias."""
    sizes = {"input_size": HIDDEN, "output_size": 640, "bias": has_bias}
    layer = build("ColumnParallelLinear", 8, 1, **sizes)
    load(layer, {None: matrix(640, HIDDEN, seed=0)})
    if has_bias:
        layer.bias.weight_loader(layer.bias, torch.arange(640.0))
    x = torch.ones(3, HIDDEN, dtype=torch.bfloat16)
    run(layer, x, 8, 1)  # Turns the weights into what the kernel takes.
    seen, copy = [], columns._copy
    monkeypatch.setattr(columns, "_copy", lambda *a: seen.append(a) or copy(*a))
    y = layer.quant_method.apply(layer, x, layer.bias)
    ((_, _, _, total, bias),) = seen
    assert total == y.shape[-1] == 80 and bias is layer.bias
