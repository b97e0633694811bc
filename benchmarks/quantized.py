"""Block-FP8 tensors: a rank's part of them, and what they stand for in fp32."""

from dataclasses import dataclass

import torch

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448


@dataclass(frozen=True)
class Part:
    """A rank's part of a dimension: ``[start, start + size)`` of ``total``."""

    total: int
    start: int
    size: int

    @classmethod
    def of(cls, total: int, rank: int, tp_size: int) -> "Part":
        size = total // tp_size
        return cls(total, rank * size, size)

    @property
    def lead(self) -> int:
        """Position of the first element in its quant block."""
        return self.start % BLOCK

    @property
    def span(self) -> int:
        """Elements of the blocks that it touches."""
        return round_up(self.lead + self.size)


def round_up(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def random_scales(*blocks: int, generator: torch.Generator) -> torch.Tensor:
    """Return fp32 scales ``[..., rows, columns]`` of quant blocks.

    Neighbouring blocks differ 10x, so that a scale in the wrong place shows.
    """
    odd = torch.arange(blocks[-2])[:, None] + torch.arange(blocks[-1])
    step = torch.where(odd % 2 == 1, 10.0, 1.0).float().to(generator.device)
    jitter = torch.rand(
        blocks, generator=generator, device=generator.device, dtype=torch.float32
    )
    return 0.005 * step * (1 + jitter)


def normal(
    *shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    device = generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def dequantized(
    weight: torch.Tensor, scale: torch.Tensor, leads: tuple[int, int], block: int
) -> torch.Tensor:
    """Return ``weight * scale``, a scale for each block of a grid.

    Args:
        weight: ``[rows, columns]``.
        scale: Of the blocks that it touches.
        leads: Where its first row and column are in their blocks.
        block: Rows and columns of a block.

    """
    for dim, lead in enumerate(leads):
        size = weight.shape[dim]
        scale = scale.repeat_interleave(block, dim).narrow(dim, lead, size)
    return weight.float() * scale


def fake_quantize(
    groups: torch.Tensor, dims=-1, powers_of_two: bool = False
) -> torch.Tensor:
    """Round fp32 values to FP8 and back, as our kernels and vLLM's CUDA kernel do.

    Args:
        groups: Those along ``dims`` share a scale.
        dims: A dimension or several.
        powers_of_two: Round scales up to such.

    """
    largest = groups.abs().amax(dims, keepdim=True).clamp_min(1e-10)
    # Scales are quotients, and codes products, rounded as IEEE says: bfloat16 has many
    # ties, which the last bit decides. By a number, a GPU would not divide.
    scale = largest / torch.full_like(largest, FP8_MAX)
    if powers_of_two:
        scale = scale.log2().ceil().exp2()
    return (groups * scale.reciprocal()).to(FP8).float() * scale


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ``||value - expected|| / ||expected||``."""
    return ((value.float() - expected).norm() / expected.norm()).item()
