# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How the weights of a cut layer are stored, and why."""

from dataclasses import dataclass

from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle


@dataclass(frozen=True)
class Compact:
    """The rank's real columns only, between which and the padding kernels tell."""

    def describe(self, spans: list[int]) -> str:
        """Return what the log line says of it."""
        return "stored compact, for masked Triton kernels"


@dataclass(frozen=True)
class Padded:
    """Whole blocks: the rank's columns between zeros.

    Attributes:
        because: What keeps them from being compact, where they could be.

    """

    because: str = ""

    def describe(self, spans: list[int]) -> str:
        """Return what the log line says of it; ``spans`` are the ranks' sizes."""
        reason = f" ({self.because})" if self.because else ""
        return f"padded to {' or '.join(map(str, spans))}{reason}"


Store = Compact | Padded


def store_for(
    experts_cls: type | None, backend: oracle.Fp8MoeBackend, moe: FusedMoEConfig
) -> Store:
    """Return how experts are stored for the kernels that vLLM chose.

    Kernels that take compact weights have a static ``why_padded(moe)``: why they do not
    take a cut layer, or None.

    Args:
        experts_cls: What it chose.
        backend: What that belongs to. Another class of it, which vLLM did not
            choose, may know why.
        moe: The layer's config.

    """
    if hasattr(experts_cls, "why_padded"):
        return Compact()
    kernels = oracle.backend_to_kernel_cls(backend) if experts_cls else []
    reasons = [k.why_padded(moe) for k in kernels if hasattr(k, "why_padded")]
    if reason := next(iter(reasons), None):
        return Padded(reason)
    if experts_cls is None:
        return Padded("vLLM has no kernel for them here")
    return Padded(f"{experts_cls.__name__} takes whole blocks")
