# SPDX-License-Identifier: Apache-2.0
"""Plain block-quantized FP8: ``quant_method: fp8``."""

from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod, Fp8MoEMethod
from vllm_patch.fp8_tp_padding.methods.experts import CutFp8MoEMethod
from vllm_patch.fp8_tp_padding.methods.linear import CutFp8LinearMethod

from .checkpoint_format import CheckpointFormat, cut_or_stock

EXPERTS = {Fp8MoEMethod: CutFp8MoEMethod}


def linear(layer, method):
    if type(method) is not Fp8LinearMethod:
        return method
    blocks = method.quant_config.weight_block_size
    return cut_or_stock(CutFp8LinearMethod, method, blocks, layer)


FORMAT = CheckpointFormat(lambda config: config.weight_block_size, EXPERTS, linear)
