# SPDX-License-Identifier: Apache-2.0
"""How far a tensor is from another one of the same shape."""

import torch

# Of a block of columns: a quant block's.
COLUMNS = 128


def worst_token(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error of a row of ``[tokens, columns]``."""
    return _worst([(value.float() - expected, expected)], dim=-1)


def worst_columns(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error of 128 columns of all tokens.

    One wrong block, row or column of a weight shows, however much is right beside it.
    """
    blocks = -(-expected.shape[-1] // COLUMNS)
    parts = (t.tensor_split(blocks, -1) for t in (value.float() - expected, expected))
    return _worst(list(zip(*parts, strict=True)), dim=None)


def _worst(parts: list[tuple[torch.Tensor, torch.Tensor]], dim: int | None) -> float:
    # A token without experts here is all zeros.
    tiny = torch.finfo(torch.float32).tiny
    errors = [
        (error.norm(dim=dim) / expected.norm(dim=dim).clamp_min(tiny)).flatten()
        for error, expected in parts
    ]
    return torch.cat(errors).max().item()
