# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors checkpoints with FP8 weights in blocks."""

from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8 import (  # noqa: E501
    CompressedTensorsW8A8Fp8MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Fp8,
    CompressedTensorsW8A16Fp8,
)
from vllm_patch.fp8_tp_padding.methods.experts import CutExperts
from vllm_patch.fp8_tp_padding.methods.linear import CutLinear

from .checkpoint_format import BLOCKS, CheckpointFormat, cut_or_stock


class CutCompressedTensorsMoEMethod(CutExperts, CompressedTensorsW8A8Fp8MoEMethod):
    """``CompressedTensorsW8A8Fp8MoEMethod`` on the checkpoint's grid of blocks."""

    weight_scale_name = "weight_scale"


@register_weight_loader_v2_supported_method
class CutCompressedTensorsLinearMethod(CutLinear, CompressedTensorsLinearMethod):
    """``CompressedTensorsLinearMethod`` on the checkpoint's grid of blocks."""

    scale_name = "weight_scale"

    def chosen_kernel(self, layer):
        scheme = layer.scheme
        if isinstance(scheme, CompressedTensorsW8A16Fp8):
            return scheme.linear_kernel
        return scheme.fp8_linear


def blocks(config) -> list[int] | None:
    return BLOCKS if config.has_blocked_weights() else None


def experts(method) -> type[CutExperts] | None:
    is_fp8 = type(method) is CompressedTensorsW8A8Fp8MoEMethod
    if is_fp8 and method.weight_block_size == BLOCKS:
        return CutCompressedTensorsMoEMethod
    return None


def linear(layer, method):
    if type(method) is not CompressedTensorsLinearMethod:
        return method
    if type(layer.scheme) not in (CompressedTensorsW8A8Fp8, CompressedTensorsW8A16Fp8):
        return method
    of_scheme = layer.scheme.weight_block_size
    return cut_or_stock(CutCompressedTensorsLinearMethod, method, of_scheme, layer)


FORMAT = CheckpointFormat(blocks, experts, linear)
