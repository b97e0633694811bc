# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The kernel that pads and quantizes, against padding first and vLLM's own."""

import pytest
import torch

from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels import (
    input_quant,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.slices.window import Window

from .tensor_parallel import rank_of, runs_kernels
from .test_linear_loading import build, load, matrix, run

pytestmark = runs_kernels

LAYOUTS = {
    "rows": {},
    "columns": {"column_major_scales": True},
    # Groups start at multiples of 16 bytes, for DeepGEMM.
    "aligned columns": {"column_major_scales": True, "tma_aligned_scales": True},
    "powers of two": {"use_ue8m0": True},
}


def quantizers(layout: str, window):
    """Return vLLM's quantization and ours."""
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    with rank_of(1, 0):
        options = {"use_ue8m0": False, **LAYOUTS[layout]}
        stock = QuantFP8(static=False, group_shape=GroupShape(1, 128), **options)
    return stock, input_quant.PaddedQuantFP8(stock, window)


@pytest.mark.parametrize("layout", LAYOUTS)
# One token; more than one and two programs own, and not a multiple of what TMA
# aligns to.
@pytest.mark.parametrize("tokens", [0, 1, 17, 33])
# Inside a block; straddling two; three blocks, from the start of the first; two
# whole blocks, as column-parallel layers have.
@pytest.mark.parametrize(("lead", "size"), [(32, 64), (96, 96), (0, 270), (0, 256)])
def test_it_is_what_vllm_makes_of_the_padded_input(layout, tokens, lead, size):
    span = -(-(lead + size) // 128) * 128
    stock, ours = quantizers(layout, Window(10 * size, size, size, lead, span))
    # A view of a larger tensor, whose other columns must not be read.
    whole = torch.full((tokens, size + 40), float("nan"), dtype=torch.bfloat16)
    x = whole[:, 8 : 8 + size]
    x.copy_(torch.randn(tokens, size) * torch.logspace(-3, 3, size))
    codes, scales = ours(x)
    if not tokens:
        assert codes.shape == (0, span) and scales.shape == (0, span // 128)
        return
    padded = torch.nn.functional.pad(x, (lead, span - lead - size))
    expected_codes, expected_scales = stock.forward_cuda(padded)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    assert torch.equal(scales, expected_scales)
    assert scales.stride() == expected_scales.stride()


@pytest.mark.parametrize("column_major", [False, True])
def test_the_operator_is_what_torch_compile_takes_it_for(column_major):
    """Schema, shapes and strides; it has no gradient and aliases nothing."""
    x = torch.randn(9, 200).bfloat16()
    args = (x, 32, 256, 128, column_major, 4, False)
    torch.library.opcheck(torch.ops.vllm.fp8_tp_padded_quant.default, args)


@pytest.mark.parametrize(("size", "calls"), [(256, True), (250, False)])
def test_torch_compile_sees_vllms_own_op_where_nothing_is_padded(
    monkeypatch, size, calls
):
    """It fuses that one with the norm before it."""
    stock, ours = quantizers("rows", Window(size, 0, size, 0, 256))
    seen = []
    monkeypatch.setattr(
        ours, "quant_fp8", lambda x, *args, **kwargs: seen.append(x) or stock(x)
    )
    x = torch.randn(3, size, dtype=torch.bfloat16)
    expected = ours(x)
    assert not seen
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for value, other in zip(ours(x), expected, strict=True):
        assert torch.equal(value.float(), other.float())
    assert bool(seen) == calls


def row_parallel():
    return build("RowParallelLinear", 8, 1, input_size=640, output_size=256, bias=False)


def column_parallel(hidden=256):
    sizes = {"input_size": hidden, "output_size": 640}
    return build("ColumnParallelLinear", 8, 1, bias=False, **sizes)


@pytest.mark.parametrize("layer", [row_parallel, column_parallel])
def test_layers_use_it(layer):
    kernel = layer().quant_method.fp8_linear
    assert type(kernel.quant_fp8).__name__ == "PaddedQuantFP8"


def test_an_input_that_ends_inside_a_group_is_left_to_vllm():
    """Which refuses it."""
    kernel = column_parallel(hidden=200).quant_method.fp8_linear
    assert type(kernel.quant_fp8).__name__ == "QuantFP8"


@pytest.mark.parametrize("obstacle", ["no CUDA", "input as it is", "own apply", "off"])
def test_other_kernels_get_a_padded_input(monkeypatch, obstacle):
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8

    kernel = type(row_parallel().quant_method.fp8_linear)
    if obstacle == "no CUDA":
        monkeypatch.setattr(input_quant.current_platform, "is_cuda", lambda: False)
    elif obstacle == "input as it is":
        monkeypatch.setattr(kernel, "apply_input_quant", False)
    elif obstacle == "own apply":
        monkeypatch.setattr(kernel, "apply_weights", lambda *a: None)
    else:
        monkeypatch.setattr(QuantFP8, "enabled", classmethod(lambda cls: False))
    seen = []
    method = row_parallel().quant_method
    assert type(method.fp8_linear.quant_fp8).__name__ == "QuantFP8"
    monkeypatch.setattr(kernel, "apply_weights", lambda s, lay, x, b: seen.append(x))
    method.apply(None, torch.ones(3, 80))
    (x,) = seen
    assert x.shape == (3, 256) and x[:, 80:160].eq(1).all() and x.sum() == 3 * 80


@pytest.fixture
def own_inputs(monkeypatch):
    """Let vLLM choose a kernel like FlashInfer's on Hopper; return what it is given.

    It quantizes by itself, and for many tokens vLLM would call another kernel.
    """
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm import BlockScaledMMLinearKernel
    from vllm.platforms import current_platform

    seen = []

    class Own(linear.TritonFp8BlockScaledMMKernel):
        apply_input_quant = False

    class ByTokens(BlockScaledMMLinearKernel.Fp8BlockScaledDynamicMMLinearKernel):
        base_type, fallback_type = Own, linear.TritonFp8BlockScaledMMKernel
        apply_input_quant = False

        def process_weights_after_loading(self, layer):
            self.fallback.process_weights_after_loading(layer)

        def apply_block_scaled_mm(self, A, B, As, Bs):
            seen.append(A)
            codes, scales = self.base.quant_fp8(A)
            return self.fallback.apply_block_scaled_mm(codes, B, scales, Bs)

    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS
    monkeypatch.setitem(kernels, current_platform._enum, [ByTokens])
    return seen


@pytest.mark.parametrize("layer", [row_parallel, column_parallel])
@pytest.mark.parametrize("compiling", [False, True])
def test_where_the_kernel_depends_on_tokens(monkeypatch, own_inputs, layer, compiling):
    """It is the one for many. Compiled columns are vLLM's choice."""
    layer = layer()
    method = layer.quant_method
    rows, columns = (256, 640) if method.layout.pads_input else (640, 256)
    load(layer, {None: matrix(rows, columns, seed=0)})
    x = torch.randint(-1, 2, (3, layer.input_size_per_partition)).bfloat16()
    y = run(layer, x, 8, 1)
    assert not own_inputs and y.shape == (3, layer.output_size_per_partition)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    assert torch.equal(method.apply(layer, x), y)
    assert len(own_inputs) == (compiling and not method.layout.pads_input)
