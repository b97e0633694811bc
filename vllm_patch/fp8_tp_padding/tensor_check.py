# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a checkpoint's tensors may be, and what becomes of a load that stops."""

import contextlib
from collections.abc import Iterator

import torch

REMEDY = (
    "a block scale must be finite and positive. The checkpoint is damaged or was "
    "quantized wrongly: download or quantize it again."
)


def first_bad_scale(scales: torch.Tensor) -> tuple[list[int], float] | None:
    """Return index and value of the first impossible scale, or None.

    Scales are looked at once they are all loaded and not one by one, because
    vLLM's sparse updates mark unchanged ones with NaN.
    """
    values = scales.float()
    bad = ~(torch.isfinite(values) & (values > 0))
    if not bad.any():
        return None
    index = bad.nonzero()[0].tolist()
    return index, values[tuple(index)].item()


def check_weight_dtype(where: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError if a checkpoint's weight is not FP8."""
    if tensor.dtype != dtype:
        raise ValueError(
            f"{where} has dtype {tensor.dtype}, but a block-quantized FP8 weight is "
            f"{dtype}. List the layer in the checkpoint's modules_to_not_convert if it "
            "is not quantized."
        )


@contextlib.contextmanager
def forgotten_on_error(loaded: set) -> Iterator[None]:
    """Clear ``loaded`` if a tensor is refused.

    A later load starts anew and must be complete by itself.
    """
    try:
        yield
    except ValueError:
        loaded.clear()
        raise
