# SPDX-License-Identifier: Apache-2.0
"""Which FP8 operators this CPU gets, and how vLLM is brought to take them."""

import enum
import functools
from types import ModuleType

import wrapt

NAMES = ("convert_weight_packed", "fp8_scaled_mm_cpu", "fused_experts_cpu")


class Operators(enum.Enum):
    """Who multiplies FP8 weights on this CPU; the values are for people."""

    VLLM = "vLLM's own"
    UNCHECKED = "vLLM's own, which run without AMX; only its check for AMX is left out"
    PLAIN_TORCH = "plain torch: vLLM has none for this CPU"


def install() -> None:
    """Have vLLM's modules changed as they are imported; imports nothing itself."""
    for change, module in (
        (_define, "vllm._custom_ops"),
        (_allow_experts, "vllm.model_executor.layers.fused_moe.experts.cpu_moe"),
        (_allow_linear, "vllm.model_executor.kernels.linear.scaled_mm.cpu"),
    ):
        wrapt.register_post_import_hook(change, module)


@functools.cache  # Before operators are defined in place of missing ones.
def choose() -> Operators:
    """Return what this process takes, once vLLM has loaded its operators."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return Operators.VLLM
    # Only the build that vLLM loads on AVX-512 with BF16 holds them.
    if all(hasattr(torch.ops._C, name) for name in NAMES):
        return Operators.UNCHECKED
    return Operators.PLAIN_TORCH


def _define(custom_ops: ModuleType) -> None:
    if choose() is Operators.PLAIN_TORCH:
        from vllm_patch.cli.cpu_fp8 import plain_torch

        plain_torch.define(custom_ops)


# The two checks ask for the CPU, for AMX and for the operators; all else that vLLM
# checks of a layer stays. Its attention asks for AMX too, and does need it.
def _allow_experts(module: ModuleType) -> None:
    module.CPUExpertsFp8._supports_current_device = staticmethod(lambda: True)


def _allow_linear(module: ModuleType) -> None:
    kernel = module.CPUFp8BlockScaledMMKernel
    kernel.is_supported = classmethod(lambda cls, compute_capability=None: (True, None))
