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

from .checkpoint_format import BLOCKS, CheckpointFormat, linear_of_schemes


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


FORMAT = CheckpointFormat(
    blocks,
    experts={CompressedTensorsW8A8Fp8MoEMethod: CutCompressedTensorsMoEMethod},
    linear=linear_of_schemes(
        CompressedTensorsLinearMethod,
        CutCompressedTensorsLinearMethod,
        CompressedTensorsW8A8Fp8,
        CompressedTensorsW8A16Fp8,
    ),
)
