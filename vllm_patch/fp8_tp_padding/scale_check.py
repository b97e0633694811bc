# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a block scale may be."""

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
