# SPDX-License-Identifier: Apache-2.0
"""The replacements that the patch table names: each gets the original to call."""

import functools
from collections.abc import Callable
from typing import Any

VARIABLE = "VLLM_FP8_TP_PADDING"
OFF = "off"
MODES = ["auto", "padded", OFF]


def with_padding_variable(variables: dict[str, Callable]) -> dict[str, Callable]:
    """Add ``VLLM_FP8_TP_PADDING`` (see ``MODES``) to vLLM's variables."""
    from vllm.envs import env_with_choices

    return {**variables, VARIABLE: env_with_choices(VARIABLE, MODES[0], MODES)}


def with_padded_layers(stock: Callable) -> Callable:
    """Give layers that are cut inside a quant block the padded methods.

    Every other layer, and every layer that vLLM does not give a plain
    ``Fp8MoEMethod`` or ``Fp8LinearMethod``, gets exactly what ``stock`` returns.
    """
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase

    @functools.wraps(stock)
    def get_quant_method(self, layer, prefix) -> Any:
        if isinstance(layer, RoutedExperts):
            return _experts_method(stock, self, layer, prefix)
        if isinstance(layer, LinearBase):
            return _linear_method(stock, self, layer, prefix)
        return stock(self, layer, prefix)

    return get_quant_method


def _experts_method(stock: Callable, config, layer, prefix) -> Any:
    from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod
    from vllm_patch.fp8_tp_padding import moe

    if not moe.needs_padding(config, layer):
        return stock(config, layer, prefix)
    # Only vLLM knows whether it quantizes this layer, and it may refuse the
    # cut size before it says so: ask it about the padded one.
    with moe.padded_sizes(config, layer.moe_config):
        method = stock(config, layer, prefix)
    if type(method) is Fp8MoEMethod:
        return moe.padded_moe_method(config, layer)
    return stock(config, layer, prefix)


def _linear_method(stock: Callable, config, layer, prefix) -> Any:
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
    from vllm_patch.fp8_tp_padding import linear

    method = stock(config, layer, prefix)
    if type(method) is not Fp8LinearMethod:
        return method
    padded = linear.padded_linear_method(config, layer)
    if padded is None:
        return method
    padded.marlin_input_dtype = method.marlin_input_dtype
    return padded
