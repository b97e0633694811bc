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
from .input_quant import PaddedQuantFP8, launches_dependently
from .masked_kernels import dependent_launch
from .tiles import BLOCK

# Tokens and columns of a program, those of fewest columns first.
TILES = (64, 16), (16, 32), (64, 32)
NUM_WARPS = 4
NUM_STAGES = 3
UNROLL = 4


def multiplies_real_rows() -> bool:
    """Whether layers shall use ``MaskedLinear``; it was tuned on Hopper only."""
    if envs.VLLM_FP8_TP_PADDING == "padded" or envs.VLLM_BATCH_INVARIANT:
        return False
    return current_platform.is_cuda() and current_platform.is_device_capability(90)


def tile_for(tokens: int, columns: int) -> tuple[int, int] | None:
    """Return the tokens and columns of a program; None for too large a product.

    That is one with more programs than multiprocessors: vLLM's kernels are then
    faster by more than the launch that is saved.
    """
    most = num_compute_units()
    return next((t for t in TILES if _programs(tokens, columns, t) <= most), None)


def _programs(tokens: int, columns: int, tile: tuple[int, int]) -> int:
    return triton.cdiv(tokens, tile[0]) * triton.cdiv(columns, tile[1])


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
        """Whether this computes what the padded product does, in fewer launches.

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
        if list(scale.shape) != blocks or not tokens:
            return False
        return tile_for(tokens, self.columns.total) is not None

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return ``[..., real columns]`` in ``out_dtype``, plus ``bias``.

        Args:
            x: ``[..., K]``, floating point.
            weight: ``[padded rows, K]``, float8.
            scale: ``[padded rows / 128, K / 128]``, float32.
            bias: ``[real columns]``.

        """
        y = x.new_empty((*x.shape[:-1], self.columns.total), dtype=self.out_dtype)
        codes, x_scale = self.quant_fp8(x.reshape(-1, x.shape[-1]))
        tokens, size = codes.shape
        tile = tile_for(tokens, self.columns.total)
        _masked_linear_kernel[(_programs(tokens, self.columns.total, tile),)](
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
            TOKENS=tile[0],
            COLUMNS=tile[1],
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
    """Write COLUMNS columns of TOKENS tokens of ``x @ w.T``, without padding.

    Grid: ceil(tokens / TOKENS) * ceil(TOTAL / COLUMNS). A tile may hold columns of
    several quant blocks and of several pieces, so each column has its own scale.
    """
    TILES: tl.constexpr = (TOTAL + COLUMNS - 1) // COLUMNS
    token = tl.program_id(0) // TILES * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    column = tl.program_id(0) % TILES * COLUMNS + tl.arange(0, COLUMNS)
    row = source_of(column, STARTS, SHIFTS)
    exists = token < tokens
    real = column < TOTAL
    row = row.to(tl.int64)
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
            w = tl.load(
                w_ptrs + block * BLOCK * w_column_stride, mask=real[:, None], other=0.0
            )
            x_scale = tl.load(
                x_scale_ptrs + block * x_scale_group_stride, mask=exists, other=0.0
            )
            w_scale = tl.load(
                w_scale_ptrs + block * w_scale_column_stride, mask=real, other=0.0
            )
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
