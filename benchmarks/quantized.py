"""Random block-FP8 tensors, and what they stand for in fp32."""

import torch

BLOCK = 128
FP8 = torch.float8_e4m3fn


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
    """Round groups of the last dimension to FP8 and back, as vLLM's kernels do."""
    groups = x.unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
    if powers_of_two:
        scale = scale.log2().ceil().exp2()
    return ((groups / scale).to(FP8).float() * scale).flatten(-2)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ``||value - expected|| / ||expected||``."""
    return ((value.float() - expected).norm() / expected.norm()).item()


def worst_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error of a token, and of 128 columns of all tokens.

    One wrong block, row or column shows, however much is right beside it.

    Args:
        value: ``[tokens, columns]``.
        expected: The same in float32.

    """
    error = value.float() - expected
    columns = -(-expected.shape[-1] // BLOCK)
    # A token without experts here is all zeros.
    tiny = torch.finfo(torch.float32).tiny
    tokens = error.norm(dim=-1) / expected.norm(dim=-1).clamp_min(tiny)
    blocks = [
        wrong.norm() / right.norm().clamp_min(tiny)
        for wrong, right in zip(
            error.tensor_split(columns, -1),
            expected.tensor_split(columns, -1),
            strict=True,
        )
    ]
    return torch.stack([tokens.max(), *blocks]).max().item()
