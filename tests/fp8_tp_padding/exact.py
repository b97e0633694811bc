# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Random numbers whose sums float32 holds exactly, in any order, on any CPU.

Weights are integers, their scales powers of two, and activations integers of which
each group has one that makes its scale a power of two as well. A sum of MAX_COLUMNS
such products stays below 2**24 units, so that nothing is rounded and results can be
compared bit for bit. The numbers come from ``torch.randint``, whose values, unlike
those of ``torch.randn``, do not depend on the instructions that a CPU has.
"""

import torch

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448
# Any eight neighbours have one activation of 448, or 896: groups of eight columns and
# more have the scale UNIT, or twice that.
PERIOD = 8
UNIT = 2.0**-6
# Of a block's activations, 16 are 448 and 112 at most 4; times 3, and 66 for the scales
# of an odd block and an even one: 0.9 * 2**24 units in this many columns.
MAX_COLUMNS = 2560


def weights(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Return float8_e4m3fn integers from -3 to 3."""
    return torch.randint(-3, 4, shape, generator=generator).float().to(FP8)


def scales(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Return float32 scales for a weight ``[..., rows, columns]``.

    Powers of two; neighbouring blocks differ at least eightfold, so that a scale in
    the wrong place shows.
    """
    blocks = *shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK)
    odd = torch.arange(blocks[-2])[:, None] + torch.arange(blocks[-1])
    exponents = torch.randint(0, 2, blocks, generator=generator) + 4 * (odd % 2)
    return torch.exp2(exponents.float() - 10)


def matrix(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight ``[rows, columns]`` and its scales."""
    generator = torch.Generator().manual_seed(seed)
    weight = weights(rows, columns, generator=generator)
    return weight, scales(rows, columns, generator=generator)


def activations(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Return float32 ``[tokens, columns]``; bfloat16 holds the values, too.

    The scales of neighbouring tokens, and of neighbouring groups, differ twofold.
    """
    assert columns <= MAX_COLUMNS, f"{columns} columns: sums would be rounded"
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-4, 5, (tokens, columns), generator=generator).float()
    signs = torch.randint(0, 2, x[:, ::PERIOD].shape, generator=generator) * 2 - 1
    x[:, ::PERIOD] = FP8_MAX * signs.float()
    group = torch.arange(columns) // BLOCK
    odd = (torch.arange(tokens)[:, None] + group) % 2
    return x * UNIT * (1 + odd)


class AnyScale:
    """Numbers whose sums are exact within a quant block, and whose scales are not.

    Weights are whole numbers times a power of two for each row, and reach from
    subnormal codes to 448. Scales and activations have all the bits of a float32.
    """

    @staticmethod
    def weights(*shape: int, generator: torch.Generator) -> torch.Tensor:
        """Return float8_e4m3fn codes, of another size in each row."""
        codes = torch.randint(-14, 15, shape, generator=generator).float()
        exponents = torch.randint(-9, 6, (*shape[:-1], 1), generator=generator)
        return (codes * torch.exp2(exponents.float())).to(FP8)

    @staticmethod
    def scales(*shape: int, generator: torch.Generator) -> torch.Tensor:
        """Return float32 scales of ``[..., rows, columns]``, as ``exact.scales``."""
        powers = scales(*shape, generator=generator)
        return powers * (1 + torch.rand(powers.shape, generator=generator))

    @staticmethod
    def activations(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
        """Return float32 ``[tokens, columns]``; their codes are whole numbers."""
        generator = torch.Generator().manual_seed(seed)
        groups = tokens, -(-columns // BLOCK)
        scale = 1 + torch.rand(groups, generator=generator)
        x = activations(tokens, columns, seed)
        # The largest rows' products are SiLU's bend, and not far beyond it.
        return x * 2.0**-9 * scale.repeat_interleave(BLOCK, -1)[:, :columns]
