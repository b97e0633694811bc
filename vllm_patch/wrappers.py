# SPDX-License-Identifier: Apache-2.0
"""The replacements that the patch table names: each gets the original to call.

Those of quantization configs are in ``formats``.
"""

import functools
from collections.abc import Callable

VARIABLE = "VLLM_FP8_TP_PADDING"
OFF = "off"
MODES = ["auto", "padded", OFF]


def with_padding_variable(variables: dict[str, Callable]) -> dict[str, Callable]:
    """Add ``VLLM_FP8_TP_PADDING`` (see ``MODES``) to vLLM's variables."""
    from vllm.envs import env_with_choices

    return {**variables, VARIABLE: env_with_choices(VARIABLE, MODES[0], MODES)}


def with_masked_experts(stock: Callable) -> Callable:
    """Offer ``MaskedTritonExperts``, where vLLM looks for its Triton experts.

    They refuse every layer that is not cut inside a quant block.
    """
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend

    @functools.wraps(stock)
    def backend_to_kernel_cls(backend) -> list[type]:
        kernels = stock(backend)
        if backend != Fp8MoeBackend.TRITON:
            return kernels
        from vllm_patch.fp8_tp_padding.kernels.masked_experts import MaskedTritonExperts

        return [MaskedTritonExperts, *kernels]

    return backend_to_kernel_cls


def with_lora_slices(projection: str) -> Callable:
    """Return what replaces vLLM's slicing of adapters of padded experts."""

    def wrapper(stock: Callable) -> Callable:
        from vllm_patch.fp8_tp_padding.loading import lora_slices

        return getattr(lora_slices, projection)(stock)

    return wrapper
