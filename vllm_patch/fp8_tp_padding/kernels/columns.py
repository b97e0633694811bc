# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Moves columns in and out of padded tensors, in one kernel launch.

While torch.compile traces, both classes use torch's own operators: Inductor folds
them into the kernels around them, and could not look into one of ours.
"""

from collections.abc import Sequence

import torch

from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton

from ..slices.window import Window
from .dependent_launch import (
    dependent_launch,
    launches_dependently,
    let_next_start,
    wait_for_previous,
)

TOKENS_PER_PROGRAM = 8
MAX_COLUMNS_PER_PROGRAM = 512


class RealColumns:
    """Takes the real columns out of a padded output.

    Args:
        windows: Where each logical shard lies in its part of the output; the parts
            follow each other.

    """

    def __init__(self, windows: Sequence[Window]):
        ends = [sum(w.span for w in windows[: i + 1]) for i in range(len(windows))]
        self.total = sum(window.size for window in windows)
        places = {(window.lead, window.size, window.span) for window in windows}
        self.alike = windows[0] if len(places) == 1 else None
        self.slices = [
            (end - window.span + window.lead, window.size)
            for end, window in zip(ends, windows, strict=True)
        ]
        self.starts = tuple(
            sum(window.size for window in windows[:i]) for i in range(len(windows))
        )
        self.shifts = tuple(
            first - start
            for (first, _), start in zip(self.slices, self.starts, strict=True)
        )

    def __call__(
        self, output: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the columns, contiguous, and plus ``bias`` if there is one.

        Args:
            output: ``[..., sum of spans]``.
            bias: ``[sum of sizes]``; the sum is rounded as torch rounds it.

        """
        if _launches():
            return _copy(output, self.starts, self.shifts, self.total, bias)
        real = self._taken(output)
        return real if bias is None else real + bias

    def _taken(self, output: torch.Tensor) -> torch.Tensor:
        if self.alike is None:
            return torch.cat([output.narrow(-1, *part) for part in self.slices], -1)
        # Inductor reads alike shards where they lie. What follows torch.cat loads
        # all of them, under masks.
        lead, size = self.alike.lead, self.alike.size
        shards = output.unflatten(-1, (-1, self.alike.span))
        return shards.narrow(-1, lead, size).flatten(-2).contiguous()


class PaddedColumns:
    """Pads an input with zeros to ``window.span``.

    Args:
        window: Where the input lies in the padded one.

    """

    def __init__(self, window: Window):
        self.window = window

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[..., window.span]``, contiguous, from ``[..., window.size]``."""
        lead, span = self.window.lead, self.window.span
        if _launches():
            return _copy(x, (0,), (-lead,), span)
        return torch.nn.functional.pad(x, (lead, span - lead - self.window.size))


def _launches() -> bool:
    return not torch.compiler.is_compiling() and current_platform.is_cuda()


def _copy(
    x: torch.Tensor,
    starts: tuple[int, ...],
    shifts: tuple[int, ...],
    total: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    y = x.new_empty((*x.shape[:-1], total), dtype=dtype)
    x = x.reshape(-1, x.shape[-1])
    tokens, size = x.shape
    columns = min(triton.next_power_of_2(total), MAX_COLUMNS_PER_PROGRAM)
    grid = triton.cdiv(tokens, TOKENS_PER_PROGRAM), triton.cdiv(total, columns)
    if tokens:
        _copy_kernel[grid](
            x,
            bias,
            y,
            tokens,
            *x.stride(),
            STARTS=starts,
            SHIFTS=shifts,
            SIZE=size,
            TOTAL=total,
            HAS_BIAS=bias is not None,
            TOKENS=TOKENS_PER_PROGRAM,
            COLUMNS=columns,
            **dependent_launch(launches_dependently()),
        )
    return y


@triton.jit
def source_of(column, STARTS: tl.constexpr, SHIFTS: tl.constexpr):
    """Where columns come from: those of the piece that starts at ``STARTS[i]`` are
    ``SHIFTS[i]`` further on. The first start is 0."""
    source = column + SHIFTS[0]
    for i in tl.static_range(1, len(STARTS)):
        source = tl.where(column >= STARTS[i], column + SHIFTS[i], source)
    return source


@triton.jit(do_not_specialize=["tokens"])
def _copy_kernel(
    x_ptr,  # [tokens, SIZE], floating point
    bias_ptr,  # [TOTAL], floating point, contiguous; None without HAS_BIAS
    y_ptr,  # [tokens, TOTAL], floating point, contiguous
    tokens,
    x_token_stride,
    x_column_stride,
    STARTS: tl.constexpr,  # see source_of
    SHIFTS: tl.constexpr,
    SIZE: tl.constexpr,
    TOTAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    USE_PDL: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write COLUMNS columns of TOKENS tokens of y, wherever their pieces start.

    Grid: (ceil(tokens / TOKENS), ceil(TOTAL / COLUMNS)). Columns that x does not
    have are zeros. The geometry is constant, so that loads and stores are as wide
    as its common divisor allows.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = source_of(column, STARTS, SHIFTS)
    exists = (token < tokens)[:, None] & (column < TOTAL)[None, :]
    real = (source >= 0) & (source < SIZE)
    wait_for_previous(USE_PDL)
    let_next_start(USE_PDL)
    y = tl.load(
        x_ptr + token[:, None] * x_token_stride + source[None, :] * x_column_stride,
        mask=exists & real[None, :],
        other=0.0,
        eviction_policy="evict_first",  # What comes next reads y.
    )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < TOTAL, other=0.0)
        y = y.to(tl.float32) + bias.to(tl.float32)[None, :]
    tl.store(
        y_ptr + token[:, None] * TOTAL + column[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=exists,
    )
