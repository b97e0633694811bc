# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The product with the real rows of a padded weight, against padding and gathering."""

import pytest
import torch

from .exact import activations, matrix
from .experts import poison
from .tensor_parallel import runs_kernels
from .test_linear_loading import HIDDEN, build, load, merged, run

pytestmark = runs_kernels

TP = 8
# 80 and 88 per rank: odd ranks start inside a block, some straddle two, and tiles
# hold columns of both shards.
SIZES = (640, 704)


@pytest.fixture
def products(monkeypatch):
    """Record the arguments of masked products."""
    from vllm.model_executor.layers.quantization.fp8_tp_padding.masked_linear import (
        MaskedLinear,
    )

    seen, product = [], MaskedLinear.__call__
    monkeypatch.setattr(
        MaskedLinear, "__call__", lambda *args: seen.append(args) or product(*args)
    )
    return seen


def loaded(rank, dtype=torch.float32):
    layer = merged(TP, rank, SIZES, dtype=dtype)
    poison(layer)
    load(layer, {i: matrix(size, HIDDEN, seed=i) for i, size in enumerate(SIZES)})
    return layer


def padded_output(layer, x, bias, monkeypatch):
    """What the layer computes without the masked product."""
    with monkeypatch.context() as patch:
        patch.setattr(layer.quant_method, "_masked", None)
        return layer.quant_method.apply(layer, x, bias)


@pytest.mark.parametrize("rank", [1, 5, 7, 0, 2, 3, 4, 6])
# One, some, and all that a program takes.
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_it_is_the_padded_product(products, monkeypatch, rank, tokens):
    layer = loaded(rank)
    x = activations(tokens, HIDDEN)
    y = run(layer, x, TP, rank)
    assert len(products) == 1
    expected = padded_output(layer, x, None, monkeypatch)
    assert len(products) == 1 and y.shape == (tokens, sum(SIZES) // TP)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_adds_the_bias(products, monkeypatch, dtype):
    """To what the product was rounded to."""
    sizes = {"input_size": HIDDEN, "output_size": 640, "bias": True}
    layer = build("ColumnParallelLinear", TP, 1, dtype, **sizes)
    load(layer, {None: matrix(640, HIDDEN, seed=0)})
    layer.bias.weight_loader(layer.bias, torch.linspace(-900, 900, 640, dtype=dtype))
    # Sums of small integers, so that the order of adding does not matter.
    x = torch.randint(-1, 2, (2, 3, HIDDEN)).to(dtype)
    run(layer, x, TP, 1)
    products.clear()
    y = layer.quant_method.apply(layer, x, layer.bias)
    expected = padded_output(layer, x, layer.bias, monkeypatch)
    assert len(products) == 1 and y.shape == (2, 3, 80)
    step = torch.finfo(dtype).eps * expected.abs().max()
    assert (y.float() - expected.float()).abs().max() <= step
    assert (y == expected).float().mean() > 0.99


def test_the_output_has_the_layers_dtype(products):
    """Whatever the input's: that of few tokens is that of many."""
    layer = loaded(1, torch.bfloat16)
    run(layer, torch.zeros(1, HIDDEN, dtype=torch.bfloat16), TP, 1)
    products.clear()
    assert (
        layer.quant_method.apply(layer, torch.ones(3, HIDDEN)).dtype == torch.bfloat16
    )
    assert len(products) == 1


@pytest.mark.parametrize(
    "columns, k, takes",
    [
        (2432, 2560, True),
        (2736, 2048, True),
        (320, 1536, True),
        # K is too large for one program.
        (320, 2688, False),
        # Programs of 32 columns, one for each of the 132 multiprocessors and one more.
        (4224, 2560, True),
        (4225, 2560, False),
    ],
)
def test_layers_that_use_it(columns, k, takes):
    from vllm.model_executor.layers.quantization.fp8_tp_padding.masked_linear import (
        multiplies_real_rows,
    )

    assert multiplies_real_rows(columns, k) == takes


def test_more_tokens_go_to_vllms_kernel():
    layer = loaded(1)
    run(layer, torch.zeros(1, HIDDEN), TP, 1)
    takes = layer.quant_method._masked.takes
    weights = layer.weight, layer.weight_scale_inv
    assert takes(torch.zeros(16, HIDDEN), *weights)
    assert takes(torch.zeros(2, 8, HIDDEN), *weights)
    assert not takes(torch.zeros(17, HIDDEN), *weights)
    assert not takes(torch.zeros(0, HIDDEN), *weights)


def test_torch_compile_sees_vllms_product(monkeypatch):
    layer = loaded(1)
    x = torch.zeros(1, HIDDEN)
    run(layer, x, TP, 1)
    takes = layer.quant_method._masked.takes
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not takes(x, layer.weight, layer.weight_scale_inv)


def test_scales_in_another_layout_go_to_vllms_kernel():
    """DeepGEMM packs four of them into an integer on Blackwell."""
    layer = loaded(1)
    run(layer, torch.zeros(1, HIDDEN), TP, 1)
    x, scale = torch.zeros(1, HIDDEN), layer.weight_scale_inv
    takes = layer.quant_method._masked.takes
    assert takes(x, layer.weight, scale)
    assert not takes(x, layer.weight, scale.to(torch.int32))
    assert not takes(x, layer.weight, scale[:-1])


@pytest.mark.parametrize(
    "variable", [("VLLM_FP8_TP_PADDING", "padded"), ("VLLM_BATCH_INVARIANT", "1")]
)
def test_it_can_be_ruled_out(monkeypatch, variable):
    monkeypatch.setenv(*variable)
    assert loaded(1).quant_method._masked is None
