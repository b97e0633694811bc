# SPDX-License-Identifier: Apache-2.0
"""Which FP8 operators this CPU gets, and how vLLM is brought to take them."""

import logging
from types import ModuleType
from unittest import mock

import wrapt

NAMES = ("convert_weight_packed", "fp8_scaled_mm_cpu", "fused_experts_cpu")
CHECKS = {
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe": (
        "CPUExpertsFp8._supports_current_device"
    ),
    "vllm.model_executor.kernels.linear.scaled_mm.cpu": (
        "CPUFp8BlockScaledMMKernel.is_supported"
    ),
}
# Only loggers below "vllm" have a handler in vLLM's processes.
logger = logging.getLogger("vllm.vllm_patch")
# Who multiplies FP8 weights on a CPU without AMX, for people.
UNCHECKED = "vLLM's own, which run without AMX; only its check for AMX is left out"
PLAIN_TORCH = "plain torch: vLLM has none for this CPU"


def install() -> None:
    """Have vLLM's modules changed as they are imported; imports nothing itself.

    A module that runs as ``__main__`` and starts an engine has to call it as
    ``__mp_main__``, too: vLLM spawns its workers, which import it by that name.
    """
    wrapt.register_post_import_hook(_define, "vllm._custom_ops")
    for module in CHECKS:
        wrapt.register_post_import_hook(_answer, module)


def choose() -> str | None:
    """Return what this CPU takes, by its flags as vLLM reads them; None: no change."""
    from torch import cpu

    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or cpu._is_amx_tile_supported():
        return None
    # vLLM loads the build that holds the operators on these only.
    if cpu._is_avx512_supported() and cpu._is_avx512_bf16_supported():
        return UNCHECKED
    return PLAIN_TORCH


def _define(custom_ops: ModuleType) -> None:
    """Say what this process takes; define what it lacks."""
    import torch

    if not (chosen := choose()):
        return
    missing = [name for name in NAMES if not hasattr(torch.ops._C, name)]
    if chosen == PLAIN_TORCH:
        from vllm_patch.cli.cpu_fp8 import plain_torch

        plain_torch.define(custom_ops)
    elif missing:
        raise ImportError(
            f"vLLM's operators {', '.join(missing)} are not there, but this CPU has "
            "AVX-512 with BF16, for which vLLM has them: does `import vllm._C` fail?"
        )
    logger.warning("FP8 operators on this CPU: %s", chosen)


def _answer(module: ModuleType) -> None:
    """Have one of vLLM's checks take this CPU for one with AMX.

    All else that it asks stays, and so do others: vLLM's attention does need AMX.
    """
    if choose():
        wrapt.wrap_function_wrapper(module, CHECKS[module.__name__], _with_amx)


def _with_amx(check, _instance, args, kwargs):
    with mock.patch("torch.cpu._is_amx_tile_supported", return_value=True):
        return check(*args, **kwargs)
