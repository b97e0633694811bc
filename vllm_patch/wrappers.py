# SPDX-License-Identifier: Apache-2.0
"""The replacements that the patch table names: each gets the original to call.

What vLLM makes of a layer decides whether it is replaced.
"""

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


def with_cut_layers(stock: Callable) -> Callable:
    """Give layers that are cut inside a quant block their methods.

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
    from vllm_patch.fp8_tp_padding.methods import experts

    if not experts.is_cut(config, layer):
        return stock(config, layer, prefix)
    # Only vLLM knows whether it quantizes this layer, and it may refuse the
    # cut size before it says so: ask it about the padded one.
    with experts.padded_sizes(config, layer.moe_config):
        method = stock(config, layer, prefix)
    if type(method) is Fp8MoEMethod:
        return experts.cut_experts_method(config, layer)
    return stock(config, layer, prefix)


def _linear_method(stock: Callable, config, layer, prefix) -> Any:
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
    from vllm_patch.fp8_tp_padding.methods import linear

    method = stock(config, layer, prefix)
    if type(method) is not Fp8LinearMethod:
        return method
    cut = linear.cut_linear_method(config, layer)
    if cut is None:
        return method
    cut.marlin_input_dtype = method.marlin_input_dtype
    return cut
