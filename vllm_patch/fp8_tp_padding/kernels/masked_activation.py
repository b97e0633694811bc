# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the masked kernels compute between their two products.

Those activations of vLLM's Triton experts that models in FP8 blocks have. All is
float32, and rounded once, when it is stored.
"""

from dataclasses import dataclass

from typing_extensions import Self

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.triton_utils import tl, triton

# Of SWIGLUSTEP, in vLLM's Triton experts: they take no other.
STEP_LIMIT = 7.0


@dataclass(frozen=True)
class Activation:
    """What ``activated`` computes.

    Attributes:
        kind: ``silu``, ``swiglustep``, ``gelu_tanh``, or ``relu2`` of gate alone.
        limit: What ``silu`` and ``swiglustep`` clamp to; None does not clamp.
        alpha: Factor of the sigmoid's argument in ``silu``.
        beta: What ``silu`` adds to up.

    """

    kind: str = "silu"
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    @classmethod
    def of(cls, moe: FusedMoEConfig) -> Self | None:
        """Return a layer's activation, or None if ``activated`` has no such one."""
        limit = None if moe.swiglu_limit is None else float(moe.swiglu_limit)
        if moe.activation == MoEActivation.SILU:
            return cls("silu", limit)
        if moe.activation == MoEActivation.SWIGLUOAI_UNINTERLEAVE:
            alpha = 1.0 if moe.swiglu_alpha is None else float(moe.swiglu_alpha)
            return cls("silu", limit, alpha, float(moe.swiglu_beta or 0.0))
        if moe.activation == MoEActivation.SWIGLUSTEP:
            return cls("swiglustep", STEP_LIMIT)
        if moe.activation == MoEActivation.GELU_TANH:
            return cls("gelu_tanh")
        if moe.activation == MoEActivation.RELU2_NO_MUL:
            return cls("relu2")
        return None

    @property
    def shards(self) -> int:
        """Projections that it takes: gate and up, or one."""
        return 1 if self.kind == "relu2" else 2

    @property
    def constants(self) -> dict[str, str | float | None]:
        """Constants of the kernel that calls ``activated``."""
        return {
            "SHARDS": self.shards,
            "ACTIVATION": self.kind,
            "LIMIT": self.limit,
            "ALPHA": self.alpha,
            "BETA": self.beta,
        }


@triton.jit
def activated(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
):
    """Return the input of down, from fp32 gate and up. It is 0 where both are.

    Where there is no up, ``gate`` is the only projection.
    """
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2 * z), which does not cancel.
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * (1 / (1 + tl.exp(-2 * z))) * up
    elif ACTIVATION == "relu2":
        relu = tl.maximum(gate, 0.0)
        return relu * relu
    elif ACTIVATION == "swiglustep":
        silu = gate * (1 / (1 + tl.exp(-gate)))
        return tl.minimum(silu, LIMIT) * tl.clamp(up, -LIMIT, LIMIT)
    else:
        if LIMIT is not None:
            gate = tl.minimum(gate, LIMIT)
            up = tl.clamp(up, -LIMIT, LIMIT)
        if BETA != 0:
            up += BETA
        return gate * (1 / (1 + tl.exp(-ALPHA * gate))) * up
