# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""FP8 constants, and the rounding rule of all kernels here.

A group's scale is its largest absolute value over 448, and a value's code the value
times the scale's reciprocal, each rounded once as IEEE says, as in the CUDA kernel of
vLLM 0.33.0 (``per_token_group_quant.cu``).
"""

import torch

from vllm.triton_utils import tl, triton

FP8 = torch.float8_e4m3fn
# Elements of a quant block in each dimension, and of an activation group.
BLOCK = 128


def constant(value: int):
    """Return a global that kernels can read.

    Up to vLLM 0.30, its stand-in for a Triton that is not there has no constexpr.
    """
    return tl.constexpr(value) if tl.constexpr else value


@triton.jit
def scale_of(absmax, USE_UE8M0: tl.constexpr):
    """Scales of groups with these absolute maxima; ``USE_UE8M0``: powers of two.

    1e-10 is the smallest absolute maximum that a group is given.
    """
    scale = tl.div_rn(tl.maximum(absmax, 1e-10), 448.0)
    if USE_UE8M0:
        scale = tl.exp2(tl.ceil(tl.log2(scale)))
    return scale


@triton.jit
def codes_of(x, scale):
    """FP8 codes of fp32 ``[rows, columns]``, whose rows have these scales."""
    codes = x * tl.div_rn(1.0, scale)[:, None]
    return tl.clamp(codes, -448.0, 448.0).to(tl.float8e4nv)


@triton.jit
def quantize_rows(x, USE_UE8M0: tl.constexpr):
    """Quantize fp32 ``[rows, group]``: codes, and a scale for each row."""
    scale = scale_of(tl.max(tl.abs(x), axis=1), USE_UE8M0)
    return codes_of(x, scale), scale
