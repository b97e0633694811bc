# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Multiplies few tokens by the real rows of a padded weight.

Taking the real columns out of a padded output is a launch of its own. It shows where
the product itself takes a few microseconds; there this one takes its place.
"""

import math

import torch

import vllm.envs as envs
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from vllm.utils.platform_utils import num_compute_units

from .columns import RealColumns, source_of
from .dependent_launch import dependent_launch, launches_dependently
from .input_quant import PaddedQuantFP8
from .tiles import BLOCK

# Of a program, which computes all tokens of its columns.
MAX_TOKENS = 16
COLUMNS_PER_PROGRAM = 32
# A program walks over all K on its own; beyond, vLLM's kernels save more than a launch.
MAX_K = 2560
NUM_WARPS = 4
NUM_STAGES = 3
UNROLL = 4


def multiplies_real_rows(columns: int, k: int) -> bool:
    """Whether a layer shall use ``MaskedLinear``; it was tuned on Hopper only.

    Args:
        columns: Real columns of the output.
        k: Columns of the weight.

    """
    if envs.VLLM_FP8_TP_PADDING == "padded" or envs.VLLM_BATCH_INVARIANT:
        return False
    if not current_platform.is_cuda() or not current_platform.is_device_capability(90):
        return False
    # Each program needs a multiprocessor of its own.
    return k <= MAX_K and _programs(columns) <= num_compute_units()


def _programs(columns: int) -> int:
    return triton.cdiv(columns, COLUMNS_PER_PROGRAM)


class MaskedLinear:
    """A column-parallel product that computes the real columns only.

    Args:
        columns: Takes the real columns out of the padded output.
        quant_fp8: Quantizes the input of the padded product.
        out_dtype: What the padded product returns.

    """

    def __init__(
        self,
        columns: RealColumns,
        quant_fp8: PaddedQuantFP8,
        out_dtype: torch.dtype,
    ):
        self.columns = columns
        self.quant_fp8 = quant_fp8
        self.out_dtype = out_dtype

    def takes(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether tokens are few, and each block of the weight has a float32 scale.

        Never while torch.compile traces: Inductor folds the taking of columns into
        what comes after, and the product stays vLLM's.

        Args:
            x: ``[..., K]``.
            weight: What the padded product takes, after loading.
            scale: Likewise.

        """
        if torch.compiler.is_compiling() or scale.dtype != torch.float32:
            return False
        blocks = [size // BLOCK for size in weight.shape]
        tokens = x.numel() // x.shape[-1]
        return list(scale.shape) == blocks and 1 <= tokens <= MAX_TOKENS

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return ``[..., real columns]`` in ``out_dtype``, plus ``bias``.

        Args:
            x: ``[..., K]``, floating point, of 1 to ``MAX_TOKENS`` tokens.
            weight: ``[padded rows, K]``, float8.
            scale: ``[padded rows / 128, K / 128]``, float32.
            bias: ``[real columns]``.

        """
        y = x.new_empty((*x.shape[:-1], self.columns.total), dtype=self.out_dtype)
        codes, x_scale = self.quant_fp8(x.reshape(-1, x.shape[-1]))
        tokens, size = codes.shape
        _masked_linear_kernel[(_programs(self.columns.total),)](
            codes,
            x_scale,
            weight,
            scale,
            bias,
            y,
            tokens,
            *x_scale.stride(),
            *weight.stride(),
            *scale.stride(),
            STARTS=self.columns.starts,
            SHIFTS=self.columns.shifts,
            TOTAL=self.columns.total,
            K=size,
            HAS_BIAS=bias is not None,
            BLOCK=BLOCK,
            TOKENS=MAX_TOKENS,
            COLUMNS=COLUMNS_PER_PROGRAM,
            NUM_STAGES=NUM_STAGES,
            UNROLL=math.gcd(UNROLL, size // BLOCK),
            num_warps=NUM_WARPS,
            **dependent_launch(launches_dependently()),
        )
        return y


@triton.jit(do_not_specialize=["tokens", "x_scale_group_stride"])
def _masked_linear_kernel(
    x_codes_ptr,  # [tokens, K], float8, contiguous
    x_scale_ptr,  # [tokens, K / BLOCK], float32
    w_ptr,  # [padded rows, K], float8
    w_scale_ptr,  # [padded rows / BLOCK, K / BLOCK], float32
    bias_ptr,  # [TOTAL], floating point; None without HAS_BIAS
    y_ptr,  # [tokens, TOTAL], floating point, contiguous
    tokens,
    x_scale_token_stride,
    x_scale_group_stride,
    w_row_stride,
    w_column_stride,
    w_scale_row_stride,
    w_scale_column_stride,
    STARTS: tl.constexpr,  # see source_of: rows of w
    SHIFTS: tl.constexpr,
    TOTAL: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Write COLUMNS columns of ``x @ w.T``, of at most TOKENS tokens, without padding.

    Grid: ceil(TOTAL / COLUMNS). A tile may hold columns of several quant blocks and
    of several pieces, so each column has its own scale.
    """
    token = tl.arange(0, TOKENS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # Beyond the last, the last again: with masks on the weight it took 10% more.
    row = source_of(tl.minimum(column, TOTAL - 1), STARTS, SHIFTS).to(tl.int64)
    exists = token < tokens
    real = column < TOTAL
    k = tl.arange(0, BLOCK)
    x_ptrs = x_codes_ptr + token[:, None] * K + k[None, :]
    x_scale_ptrs = x_scale_ptr + token * x_scale_token_stride
    w_ptrs = w_ptr + row[:, None] * w_row_stride + k[None, :] * w_column_stride
    w_scale_ptrs = w_scale_ptr + row // BLOCK * w_scale_row_stride
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for first in tl.range(0, K // BLOCK, UNROLL, num_stages=NUM_STAGES):
        for i in tl.static_range(UNROLL):
            block = first + i
            x = tl.load(x_ptrs + block * BLOCK, mask=exists[:, None], other=0.0)
            w = tl.load(w_ptrs + block * BLOCK * w_column_stride)
            x_scale = tl.load(
                x_scale_ptrs + block * x_scale_group_stride, mask=exists, other=0.0
            )
            w_scale = tl.load(w_scale_ptrs + block * w_scale_column_stride)
            y += tl.dot(x, tl.trans(w)) * (x_scale[:, None] * w_scale[None, :])

    if HAS_BIAS:
        # vLLM adds it to what the product was rounded to.
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(bias_ptr + column, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + token[:, None] * TOTAL + column[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=exists[:, None] & real[None, :],
    )
