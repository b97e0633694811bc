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

from .checkpoint_format import BLOCKS, CheckpointFormat, linear_of_schemes


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


FORMAT = CheckpointFormat(
    blocks,
    experts={QuarkW8A8Fp8MoEMethod: CutQuarkMoEMethod},
    linear=linear_of_schemes(
        QuarkLinearMethod, CutQuarkLinearMethod, QuarkW8A8Fp8PerBlock
    ),
)
