# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""All experts in float32, the readable way, and how far a kernel may be from it."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from vllm.model_executor.layers import activation as native

from .exact import FP8, FP8_MAX
from .experts import BLOCK, Checkpoint, ungated, vllm_version

# float32 rounds by this, relative to the value.
ROUNDING = 2.0**-24
# SiLU, whose exponential each library rounds in its own way, and the scale of the
# group add about 20 roundings to an intermediate value; GELU, no more. Where that makes
# another code of it, either is right.
TIE = 32 * ROUNDING
# Gate and up sum whole numbers within a group, exactly; what a group's sum is
# multiplied by, and the sum over groups, round this much of the groups' sizes.
GROUPS = 8 * ROUNDING
# A result sums codes times weights in groups of up to 128, then fewer than 64 groups,
# each multiplied by such a scale and a router's weight: in any order, that rounds by
# no more than this times the sum of the terms' sizes.
SUM = 256 * ROUNDING


@dataclass(frozen=True)
class Activation:
    """What experts may compute of gate and up, or of one projection.

    Attributes:
        compute: vLLM's own way in torch, of ``[gate and up]``.
        kwargs: How vLLM's factory is asked for it.
        bend: Factor of the activations of ``exact``, for gates where it bends.
        gated: Whether there are gate and up.

    """

    compute: Callable[[torch.Tensor], torch.Tensor]
    kwargs: dict[str, str | float]
    bend: float = 1.0
    gated: bool = True


def of_layer(name: str, **attributes) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what an activation layer of vLLM computes, which no CPU can make."""
    layer, forward = SimpleNamespace(**attributes), getattr(native, name).forward_native
    return lambda x: forward(layer, x)


# Four times the activations of ``exact`` make about every second gate exceed it, and
# every third the 7 that SWIGLUSTEP has in vLLM's Triton experts.
LIMIT = 4.0
ACTIVATIONS = {
    "silu": Activation(native.SiluAndMul.forward_native, {}),
    "clamped": Activation(
        of_layer("SiluAndMulWithClamp", swiglu_limit=LIMIT, alpha=1.0, beta=0.0),
        {"swiglu_limit": LIMIT},
        bend=4.0,
    ),
    "swigluoai": Activation(
        of_layer("SiluAndMulWithClamp", swiglu_limit=LIMIT, alpha=1.702, beta=1.0),
        {
            "activation": "swigluoai_uninterleave",
            "swiglu_limit": LIMIT,
            "swiglu_alpha": 1.702,
            "swiglu_beta": 1.0,
        },
        bend=4.0,
    ),
    "swiglustep": Activation(
        of_layer("SwigluStepAndMul", limit=7.0), {"activation": "swiglustep"}, bend=4.0
    ),
    "gelu_tanh": Activation(
        of_layer("GeluAndMul", approximate="tanh"),
        {"activation": "gelu_tanh"},
        bend=0.25,
    ),
}
if vllm_version() >= (0, 28):
    compute = of_layer("ReLUSquaredActivation")
    ACTIVATIONS["relu2"] = Activation(compute, ungated(), gated=False)


def scale_of(x: torch.Tensor) -> torch.Tensor:
    """Return the scale of an activation group; by a tensor, so that it is divided."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-10)
    return largest / torch.full_like(largest, FP8_MAX)


def fake_quantize(x: torch.Tensor) -> torch.Tensor:
    """Round one activation group to FP8 and back, as vLLM does before a GEMM."""
    scale = scale_of(x)
    return (x * scale.reciprocal()).to(FP8).to(x.dtype) * scale


def open_codes(x: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Return how far apart the codes are that a group's values may round to.

    Args:
        x: The values.
        error: How far off each may be.

    """
    scale = scale_of(x)
    largest = x.abs().argmax(-1, keepdim=True)
    of_scale = error.gather(-1, largest) / x.abs().gather(-1, largest).clamp_min(1e-10)
    error = error + x.abs() * (TIE + of_scale)
    low, high = (((x + e) / scale).to(FP8).double() for e in (-error, error))
    return (high - low).abs() * scale


def groups_of_rank(start: int, size: int) -> list[slice]:
    """Cut a rank's columns where the checkpoint's blocks end."""
    cuts = [start, *range(-(-(start + 1) // BLOCK) * BLOCK, start + size, BLOCK)]
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], start + size], strict=True)]


@dataclass
class Expected:
    """A result, and how far from it another one may be.

    Attributes:
        value: float64 ``[tokens, hidden]``.
        size: The sizes of its terms, summed.
        open: What codes that lie at a tie can change.
        tied: How many those are.
        codes: Of how many.

    """

    value: torch.Tensor
    size: torch.Tensor
    open: torch.Tensor
    tied: int = 0
    codes: int = 0

    def check(self, value: torch.Tensor) -> None:
        """Assert that ``value`` is this, up to the rounding of sums and of ties."""
        assert self.tied <= 1 + self.codes / 1000, f"{self.tied} codes lie at a tie"
        error = (value.double() - self.value).abs()
        excess = error - SUM * self.size - self.open
        worst = int(excess.nan_to_num(torch.inf).argmax())
        assert (excess <= 0).all(), (
            f"element {worst}: {value.flatten()[worst]} instead of "
            f"{self.value.flatten()[worst]}, allowed {error.flatten()[worst]} less "
            f"{excess.flatten()[worst]}; {int((excess > 0).sum())} such elements"
        )


def reference(
    checkpoint: Checkpoint,
    total: int,
    tp_size: int,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    biases: dict[str, torch.Tensor] | None = None,
    ranks: list[int] | None = None,
    activation: str = "silu",
) -> Expected:
    """Sum over ``ranks`` (default: all), activations quantized in their groups.

    Args:
        checkpoint: The experts.
        total: Intermediate size of one expert, over all ranks.
        tp_size: Tensor-parallel size.
        x: ``[tokens, hidden]``.
        topk_weights: ``[tokens, top_k]``.
        topk_ids: ``[tokens, top_k]``; slots below 0 count nothing.
        biases: ``[experts, size]`` of each shard.
        ranks: Whose part of the sum to return.
        activation: A key of ``ACTIVATIONS``.

    """
    count = checkpoint.weights["w1"].shape[0]
    biases = biases or dict.fromkeys(("w1", "w3", "w2"), torch.zeros(count, 1))
    gate_up = [shard for shard in ("w1", "w3") if shard in checkpoint.weights]
    *first, down = (
        checkpoint.dequantized(shard, torch.float64) for shard in (*gate_up, "w2")
    )
    x = torch.cat([fake_quantize(g) for g in x.float().split(BLOCK, -1)], -1).double()
    size = total // tp_size
    out = Expected(*torch.zeros(3, *x.shape, dtype=torch.float64))
    for token, slot in torch.cartesian_prod(*map(torch.arange, topk_ids.shape)):
        expert, factor = topk_ids[token, slot], topk_weights[token, slot].double()
        if expert < 0:
            continue
        bias = {shard: biases[shard][expert].double() for shard in biases}
        parts, rounded = zip(
            *(product(weight[expert], x[token]) for weight in first), strict=True
        )
        parts = [y + bias[shard] for shard, y in zip(gate_up, parts, strict=True)]
        hidden, error = activated(
            torch.cat(parts), torch.cat(rounded), ACTIVATIONS[activation].compute
        )
        out.value[token] += factor * bias["w2"]
        out.size[token] += factor * bias["w2"].abs()
        for rank in range(tp_size) if ranks is None else ranks:
            for group in groups_of_rank(rank * size, size):
                columns = factor * down[expert][:, group]
                codes = fake_quantize(hidden[group])
                may_differ = open_codes(hidden[group], error[group])
                out.value[token] += columns @ codes
                out.size[token] += columns.abs() @ codes.abs()
                out.open[token] += columns.abs() @ may_differ
                out.tied += int((may_differ > 0).sum())
                out.codes += len(may_differ)
    return out


def activated(
    gate_up: torch.Tensor,
    rounded: torch.Tensor,
    compute: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is computed, and what inputs that are so ``rounded`` change."""
    hidden = compute(gate_up.requires_grad_())
    (slopes,) = torch.autograd.grad(hidden.sum(), gate_up)
    error = (slopes.abs() * rounded).unflatten(0, (-1, len(hidden))).sum(0)
    return hidden.detach(), error


def product(weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``weight @ x``, whose groups are exact, and what float32 rounds of it."""
    groups = (weight * x).unflatten(-1, (-1, BLOCK)).sum(-1)
    return groups.sum(-1), GROUPS * groups.abs().sum(-1)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.float() - expected).norm() / expected.norm()).item()
