# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where the intermediates of a call lie in vLLM's workspace."""

from itertools import accumulate
from math import prod

import torch

# Name -> shape and dtype.
Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]


def bytes_of(buffers: Buffers) -> int:
    """Return the bytes of a workspace that holds them."""
    return sum(_aligned(_bytes(*buffer)) for buffer in buffers.values())


def offsets_of(buffers: Buffers) -> dict[str, int]:
    """Return where each starts, in bytes."""
    sizes = [_aligned(_bytes(*buffer)) for buffer in buffers.values()]
    return dict(zip(buffers, accumulate([0, *sizes]), strict=False))


def carve(workspace: torch.Tensor, buffers: Buffers) -> dict[str, torch.Tensor]:
    """Return the buffers, as views of ``workspace``, which has room for them."""
    raw, offsets = workspace.view(-1).view(torch.uint8), offsets_of(buffers)
    return {
        name: raw.narrow(0, offsets[name], _bytes(shape, dtype)).view(dtype).view(shape)
        for name, (shape, dtype) in buffers.items()
    }


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 256) * 256
