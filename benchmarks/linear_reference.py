"""What a block-FP8 linear layer should compute, in fp32."""

from dataclasses import dataclass

import torch

from benchmarks.linear_cases import Case, Quantized, kernel_of
from benchmarks.quantized import BLOCK, FP8, FP8_MAX, fake_quantize, round_up


@dataclass(frozen=True)
class Arithmetic:
    """How a kernel of vLLM rounds what it multiplies, besides its FP8 weights.

    Attributes:
        quantizes: It takes FP8 activations, with a scale for each group of 128.
        powers_of_two: It rounds all scales up to powers of two and quantizes again,
            as DeepGEMM does by default.
        bfloat16_scales: It rounds weight scales to bfloat16, as Marlin does.

    """

    quantizes: bool
    powers_of_two: bool
    bfloat16_scales: bool

    @classmethod
    def of(cls, layer: torch.nn.Module) -> "Arithmetic":
        kernel = kernel_of(layer)
        quantizes = hasattr(kernel, "apply_block_scaled_mm")
        # FlashInfer's multiplies by weights made for DeepGEMM. How it rounds inputs
        # does not matter: it is given what needs no rounding.
        made_for = getattr(kernel, "fallback", kernel)
        return cls(
            quantizes=quantizes,
            powers_of_two=quantizes and made_for.quant_fp8.use_ue8m0,
            bfloat16_scales=not quantizes,
        )

    def __str__(self) -> str:
        if not self.quantizes:
            return "not quantized"
        return "powers of two" if self.powers_of_two else "exact"

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is left of ``[tokens, whole groups]``."""
        if not self.quantizes:
            return x
        groups = x.unflatten(-1, (-1, BLOCK))
        return fake_quantize(groups, -1, self.powers_of_two).flatten(-2)

    def weights(self, weight: torch.Tensor, lead: tuple[int, int]) -> torch.Tensor:
        """Return what is left of a rank's ``[rows, columns]``.

        Args:
            weight: Dequantized.
            lead: Where its first row and column are in their blocks.

        """
        if not self.powers_of_two:
            return weight
        rows, columns = weight.shape
        padded = _on_grid(_on_grid(weight, lead[1]).T, lead[0]).T
        blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        blocks = fake_quantize(blocks, (1, 3), powers_of_two=True)
        padded = blocks.flatten(2, 3).flatten(0, 1)
        return padded.narrow(0, lead[0], rows).narrow(1, lead[1], columns)


def of_fp8_values(x: torch.Tensor, lead: int) -> torch.Tensor:
    """Return activations near ``x`` that no quantization rounds.

    For kernels that divide by approximation, and so round up what the reference
    rounds down: multiples of powers of two, and in each group one of 448.

    Args:
        x: ``[tokens, columns]``.
        lead: Where its first column is in its block.

    """
    groups = _on_grid(x.float(), lead).unflatten(-1, (-1, BLOCK))
    largest = groups.abs().amax(-1, keepdim=True)
    scale = (largest / FP8_MAX).log2().ceil().exp2()
    codes = (groups / scale).to(FP8).float()
    codes = torch.where(groups.abs() == largest, groups.sign() * FP8_MAX, codes)
    return (codes * scale).flatten(-2).narrow(-1, lead, x.shape[-1]).to(x.dtype)


def expected(
    case: Case,
    tensors: list[Quantized],
    rank: int,
    x: torch.Tensor,
    arithmetic: Arithmetic,
) -> torch.Tensor:
    """Multiply with rank ``rank``'s part of the dequantized checkpoint.

    Groups of activations lie on the checkpoint's block grid.
    """
    parts = case.parts(rank)
    lead = parts[0].lead if case.is_row else 0
    size = x.shape[-1]
    x = arithmetic.activations(_on_grid(x.float(), lead)).narrow(-1, lead, size)
    weights = []
    for tensor, part in zip(tensors, parts, strict=True):
        scale = tensor.scale
        if arithmetic.bfloat16_scales:
            scale = scale.bfloat16().float()
        whole = Quantized(tensor.weight, scale).dequantized()
        dim = 1 if case.is_row else 0
        mine = whole.narrow(dim, part.start, part.size)
        leads = (0, part.lead) if case.is_row else (part.lead, 0)
        weights.append(arithmetic.weights(mine, leads))
    return x @ torch.cat(weights).T


def _on_grid(tensor: torch.Tensor, lead: int) -> torch.Tensor:
    """Pad the last dimension with zeros to whole blocks."""
    size = tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (lead, round_up(lead + size) - lead - size))
