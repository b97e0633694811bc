# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where the intermediates of a call lie in vLLM's workspace."""

from math import prod

import torch

# Name -> shape and dtype.
Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]


def bytes_of(buffers: Buffers) -> int:
    """Return the bytes of a workspace that holds them."""
    return sum(_aligned(_bytes(*buffer)) for buffer in buffers.values())


def carve(workspace: torch.Tensor, buffers: Buffers) -> dict[str, torch.Tensor]:
    """Return the buffers, as views of ``workspace``.

    Raises:
        ValueError: It is too small.

    """
    needed = bytes_of(buffers)
    if workspace.nbytes < needed:
        raise ValueError(
            f"The workspace of the masked kernels has {workspace.nbytes} bytes, but "
            f"this call needs {needed}."
        )
    raw, offset, views = workspace.view(-1).view(torch.uint8), 0, {}
    for name, (shape, dtype) in buffers.items():
        num_bytes = _bytes(shape, dtype)
        views[name] = raw[offset : offset + num_bytes].view(dtype).view(shape)
        offset += _aligned(num_bytes)
    return views


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 256) * 256
