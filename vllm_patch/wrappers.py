# SPDX-License-Identifier: Apache-2.0
"""The replacements that the patch table names: each gets the original to call."""

import functools
from collections.abc import Callable
from typing import Any

VARIABLE = "VLLM_FP8_TP_PADDING"
MODES = ["auto", "off"]


def with_padding_variable(variables: dict[str, Callable]) -> dict[str, Callable]:
    """Add ``VLLM_FP8_TP_PADDING`` (``auto`` or ``off``) to vLLM's variables."""
    from vllm.envs import env_with_choices

    return {**variables, VARIABLE: env_with_choices(VARIABLE, MODES[0], MODES)}


def with_padded_experts(stock: Callable) -> Callable:
    """Give experts that are cut inside a quant block the padded method.

    Every other layer, and every layer that vLLM does not give a plain
    ``Fp8MoEMethod``, gets exactly what ``stock`` returns.
    """
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod

    @functools.wraps(stock)
    def get_quant_method(self, layer, prefix) -> Any:
        if not isinstance(layer, RoutedExperts):
            return stock(self, layer, prefix)

        from vllm_patch.fp8_tp_padding import moe

        if not moe.needs_padding(self, layer):
            return stock(self, layer, prefix)
        # Only vLLM knows whether it quantizes this layer, and it may refuse the
        # cut size before it says so: ask it about the padded one.
        with moe.padded_sizes(self, layer.moe_config):
            method = stock(self, layer, prefix)
        if type(method) is Fp8MoEMethod:
            return moe.Fp8TpPaddedMoEMethod(self, layer)
        return stock(self, layer, prefix)

    return get_quant_method
