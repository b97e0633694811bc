"""Random block-FP8 tensors, and what they stand for in fp32."""

import torch

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448


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


def fake_quantize(
    x: torch.Tensor, group: int = BLOCK, powers_of_two: bool = False
) -> torch.Tensor:
    """Round groups of the last dimension to FP8 and back, as kernels of experts do."""
    groups = x.unflatten(-1, (-1, group))
    if powers_of_two:
        scale = quantization_scale(groups, -1, powers_of_two)
    else:
        # By a number: on a GPU, torch multiplies by its reciprocal, as Triton does.
        # bfloat16 has many ties, and they go another way by the last bit of a scale.
        scale = _largest(groups, -1) / FP8_MAX
    return ((groups / scale).to(FP8).float() * scale).flatten(-2)


def quantization_scale(groups: torch.Tensor, dims, powers_of_two: bool) -> torch.Tensor:
    """Return what the largest value along ``dims`` is divided by to become 448."""
    largest = _largest(groups, dims)
    # By a tensor, so that a GPU divides as well.
    scale = largest / torch.full_like(largest, FP8_MAX)
    return scale.log2().ceil().exp2() if powers_of_two else scale


def _largest(groups: torch.Tensor, dims) -> torch.Tensor:
    return groups.abs().amax(dims, keepdim=True).clamp_min(1e-10)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ``||value - expected|| / ||expected||``."""
    return ((value.float() - expected).norm() / expected.norm()).item()


def worst_token(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error of a row of ``[tokens, columns]``."""
    return _worst([(value.float() - expected, expected)], dim=-1)


def worst_columns(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error of 128 columns of all tokens.

    One wrong block, row or column of a weight shows, however much is right beside it.
    """
    blocks = -(-expected.shape[-1] // BLOCK)
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
