# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The product with the real rows of a padded weight, against padding and gathering."""

import pytest
import torch

from .tensor_parallel import runs_kernels
from .test_linear_loading import HIDDEN, load, matrix, merged, run

pytestmark = runs_kernels

TP = 8
# A bit over half a block each: odd ranks start inside a block, and tiles hold columns
# of both shards.
SIZES = (640, 704)


@pytest.fixture
def products(monkeypatch):
    """Record the inputs of masked products."""
    from vllm.model_executor.layers.quantization.fp8_tp_padding.masked_linear import (
        MaskedLinear,
    )

    seen, product = [], MaskedLinear.__call__
    monkeypatch.setattr(
        MaskedLinear, "__call__", lambda *args: seen.append(args) or product(*args)
    )
    return seen


def padded_output(layer, x, bias, monkeypatch):
    """What the layer computes without the masked product."""
    with monkeypatch.context() as patch:
        patch.setattr(layer.quant_method, "_masked", None)
        return layer.quant_method.apply(layer, x, bias)


@pytest.mark.parametrize("rank", [1, 5, 7, 0, 2, 3, 4, 6])
@pytest.mark.parametrize("tokens", [1, 17, 65])
def test_it_is_the_padded_product(products, monkeypatch, rank, tokens):
    layer = merged(TP, rank, SIZES, dtype=torch.float32)
    tensors = {i: matrix(size, HIDDEN, seed=i) for i, size in enumerate(SIZES)}
    load(layer, tensors)
    x = torch.randn(tokens, HIDDEN) * torch.logspace(-3, 3, HIDDEN)
    y = run(layer, x, TP, rank)
    assert len(products) == 1
    expected = padded_output(layer, x, None, monkeypatch)
    assert len(products) == 1 and y.shape == (tokens, sum(SIZES) // TP)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
