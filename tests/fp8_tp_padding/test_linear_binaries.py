# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Kernels of linear layers compile once, for any number of tokens."""

import pytest
import torch

from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels import (
    columns,
    input_quant,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.slices.window import Window

from .tensor_parallel import runs_kernels
from .triton_keys import record

pytestmark = runs_kernels

# Programs that are full or not, multiples of 16, and the most.
TOKENS = [*range(1, 66), 127, 1000, 4096, 16383, 16384]
# DeepSeek-V2-Lite's at TP 8: 1368 is no multiple of 16.
WINDOW = Window(10944, 1368, 1368, 88, 1536)


def inputs(size):
    """Tensors as vLLM's linear layers view them, of any number of tokens.

    The stride of a single one may be any number, until it is viewed.
    """
    whole = torch.empty(TOKENS[-1], 2 * size, dtype=torch.bfloat16)
    for tokens in TOKENS:
        yield whole.view(-1, size)[:tokens]
    yield whole[:1, :size].contiguous().view(-1, size)


@pytest.mark.parametrize("bias", [False, True])
def test_taking_and_padding_columns(monkeypatch, bias):
    keys = record(monkeypatch, columns)
    take, pad = columns.RealColumns([WINDOW, WINDOW]), columns.PaddedColumns(WINDOW)
    bias = torch.empty(2 * WINDOW.size, dtype=torch.bfloat16) if bias else None
    for output in inputs(2 * WINDOW.span):
        take(output, bias)
    assert len(keys) == 1
    for x in inputs(WINDOW.size):
        pad(x)
    assert len(keys) == 2


@pytest.mark.parametrize("column_major", [False, True])
def test_quantizing(monkeypatch, column_major):
    keys = record(monkeypatch, input_quant)
    scales = {"column_major": column_major, "row_multiple": 4, "use_ue8m0": False}
    for x in inputs(WINDOW.size):
        input_quant._padded_quant(x, WINDOW.lead, WINDOW.span, 128, **scales)
    assert len(keys) == 1
