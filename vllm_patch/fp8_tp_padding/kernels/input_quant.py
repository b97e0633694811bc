# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quantizes a layer's input and pads it where needed, in one kernel launch."""

import torch

from vllm.model_executor.kernels.linear import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledDynamicMMLinearKernel,
)
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from vllm.utils.deep_gemm import DeepGemmQuantScaleFMT
from vllm.utils.torch_utils import direct_register_custom_op

from ..slices.window import Window
from .dependent_launch import (
    dependent_launch,
    launches_dependently,
    let_next_start,
    wait_for_previous,
)
from .fp8_quant import FP8, quantize_rows

TOKENS_PER_PROGRAM = 16


def quantizing_kernel(
    kernel: object, window: Window
) -> Fp8BlockScaledMMLinearKernel | None:
    """Return a linear kernel whose ``quant_fp8`` can be a ``PaddedQuantFP8``.

    That is ``kernel``, or the one to which it leaves large batches, with the same
    weights, as FlashInfer's does to DeepGEMM. None where an input must be padded
    beforehand: it is taken as it is, or in a layout of scales that
    ``PaddedQuantFP8`` does not write.

    Args:
        kernel: The one that ``Fp8LinearMethod`` chose.
        window: Where the input lies in the padded one.

    """
    if isinstance(kernel, Fp8BlockScaledDynamicMMLinearKernel):
        kernel = kernel.fallback
    return kernel if _quantizes_input(kernel, window) else None


def _quantizes_input(kernel: object, window: Window) -> bool:
    stock = Fp8BlockScaledMMLinearKernel
    if not current_platform.is_cuda() or not isinstance(kernel, stock):
        return False
    if type(kernel).apply_weights is not stock.apply_weights:
        return False
    if not kernel.apply_input_quant or not QuantFP8.enabled():
        return False
    if window.span % kernel.quant_fp8.group_size:
        return False
    packed = DeepGemmQuantScaleFMT.UE8M0
    return not (
        kernel.quant_fp8.use_ue8m0 and DeepGemmQuantScaleFMT.from_oracle() == packed
    )


class PaddedQuantFP8:
    """Does what ``QuantFP8`` does to an input padded with zeros to ``window.span``.

    A whole window pads nothing. While torch.compile traces, its input goes to
    ``quant_fp8``, which vLLM's passes fuse with the norm or activation before it.

    Args:
        quant_fp8: The kernel's own, with groups along the last dimension.
        window: Where the input lies in the padded one.

    """

    def __init__(self, quant_fp8: QuantFP8, window: Window):
        self.quant_fp8 = quant_fp8
        self.window = window
        self.group = quant_fp8.group_size
        self.column_major = quant_fp8.column_major_scales
        self.row_multiple = 4 if quant_fp8.tma_aligned_scales else 1
        self.use_ue8m0 = quant_fp8.use_ue8m0

    def __call__(
        self, x: torch.Tensor, scale=None, scale_ub=None, use_triton: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float8 ``[tokens, span]`` and float32 ``[tokens, span / group]``.

        Args:
            x: ``[tokens, size]``, contiguous in the last dimension.
            scale: None; scales are dynamic.
            scale_ub: None, likewise.
            use_triton: For ``quant_fp8``.

        """
        assert scale is None and scale_ub is None
        is_whole = self.window.size == self.window.span
        if is_whole and torch.compiler.is_compiling():
            return self.quant_fp8(x, scale, scale_ub, use_triton=use_triton)
        return torch.ops.vllm.fp8_tp_padded_quant(
            x,
            self.window.lead,
            self.window.span,
            self.group,
            self.column_major,
            self.row_multiple,
            self.use_ue8m0,
        )


def _padded_quant(
    x: torch.Tensor,
    lead: int,
    span: int,
    group: int,
    column_major: bool,
    row_multiple: int,
    use_ue8m0: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = _padded_quant_fake(
        x, lead, span, group, column_major, row_multiple, use_ue8m0
    )
    assert x.stride(-1) == 1, "groups of the input must be contiguous"
    tokens, size = x.shape
    grid = triton.cdiv(tokens, TOKENS_PER_PROGRAM), span // group
    if tokens:
        _padded_quant_kernel[grid](
            x,
            codes,
            scales,
            tokens,
            size,
            lead,
            span,
            x.stride(0),
            *scales.stride(),
            USE_UE8M0=use_ue8m0,
            GROUP=group,
            TOKENS=TOKENS_PER_PROGRAM,
            **dependent_launch(launches_dependently()),
        )
    return codes, scales


def _padded_quant_fake(
    x: torch.Tensor,
    lead: int,
    span: int,
    group: int,
    column_major: bool,
    row_multiple: int,
    use_ue8m0: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, groups = x.shape[0], span // group
    codes = x.new_empty((tokens, span), dtype=FP8)
    strides = (groups, 1)
    if column_major:
        strides = (1, (tokens + row_multiple - 1) // row_multiple * row_multiple)
    scales = x.new_empty_strided((tokens, groups), strides, dtype=torch.float32)
    return codes, scales


@triton.jit(do_not_specialize=["tokens", "scales_group_stride"])
def _padded_quant_kernel(
    x_ptr,  # [tokens, size], floating point
    codes_ptr,  # [tokens, span], float8, contiguous
    scales_ptr,  # [tokens, span / GROUP], float32, any strides
    tokens,
    size,
    lead,
    span,
    x_stride,  # from token to token
    scales_token_stride,
    scales_group_stride,
    USE_UE8M0: tl.constexpr,  # round scales up to powers of two
    USE_PDL: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Pad and quantize one group of TOKENS tokens.

    Grid: (ceil(tokens / TOKENS), span / GROUP). Columns outside
    ``[lead, lead + size)`` are loaded as zeros, so they change no scale.
    """
    wait_for_previous(USE_PDL)
    let_next_start(USE_PDL)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    group = tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)
    exists = token[:, None] < tokens
    real = (column >= lead) & (column < lead + size)
    x = tl.load(
        x_ptr + token[:, None] * x_stride + (column - lead)[None, :],
        mask=exists & real[None, :],
        other=0.0,
    ).to(tl.float32)
    codes, scale = quantize_rows(x, USE_UE8M0)
    tl.store(codes_ptr + token[:, None] * span + column[None, :], codes, mask=exists)
    tl.store(
        scales_ptr + token * scales_token_stride + group * scales_group_stride,
        scale,
        mask=token < tokens,
    )


direct_register_custom_op(
    "fp8_tp_padded_quant", _padded_quant, fake_impl=_padded_quant_fake
)
