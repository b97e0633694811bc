# SPDX-License-Identifier: Apache-2.0
"""Quark checkpoints with FP8 weights per block."""

from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.quark.quark import QuarkLinearMethod
from vllm.model_executor.layers.quantization.quark.quark_moe import (
    QuarkW8A8Fp8MoEMethod,
)
from vllm.model_executor.layers.quantization.quark.schemes.quark_w8a8_fp8 import (
    QuarkW8A8Fp8PerBlock,
)
from vllm_patch.fp8_tp_padding.methods.experts import CutExperts
from vllm_patch.fp8_tp_padding.methods.linear import CutLinear

from .checkpoint_format import BLOCKS, CheckpointFormat, cut_or_stock


class CutQuarkMoEMethod(CutExperts, QuarkW8A8Fp8MoEMethod):
    """``QuarkW8A8Fp8MoEMethod`` on the checkpoint's grid of blocks."""

    weight_scale_name = "weight_scale"


@register_weight_loader_v2_supported_method
class CutQuarkLinearMethod(CutLinear, QuarkLinearMethod):
    """``QuarkLinearMethod`` on the checkpoint's grid of blocks."""

    scale_name = "weight_scale"

    def chosen_kernel(self, layer):
        return layer.scheme.fp8_linear


def blocks(config) -> list[int] | None:
    return BLOCKS if "per_block" in str(config.quant_config) else None


def experts(method) -> type[CutExperts] | None:
    is_fp8 = type(method) is QuarkW8A8Fp8MoEMethod
    if is_fp8 and method.weight_block_size == BLOCKS:
        return CutQuarkMoEMethod
    return None


def linear(layer, method):
    if type(method) is not QuarkLinearMethod:
        return method
    if type(layer.scheme) is not QuarkW8A8Fp8PerBlock:
        return method
    of_scheme = layer.scheme.weight_block_size
    return cut_or_stock(CutQuarkLinearMethod, method, of_scheme, layer)


FORMAT = CheckpointFormat(blocks, experts, linear)
