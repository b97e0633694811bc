# SPDX-License-Identifier: Apache-2.0
"""ModelOpt checkpoints with FP8 weights per block: FP8_PB_WO, alone and mixed."""

from dataclasses import replace

from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.modelopt import (
    KFp8Block128,
    ModelOptLinearMethod,
)
from vllm_patch.fp8_tp_padding.loading.sliced_tensor import SlicedTensor
from vllm_patch.fp8_tp_padding.methods.linear import CutLinear
from vllm_patch.fp8_tp_padding.slices.window import Window

from . import fp8
from .checkpoint_format import BLOCKS, CheckpointFormat, cut_or_stock


@register_weight_loader_v2_supported_method
class CutModelOptLinearMethod(CutLinear, ModelOptLinearMethod):
    """``ModelOptLinearMethod`` on the checkpoint's grid of blocks."""

    scale_name = "weight_scale"

    def chosen_kernel(self, layer):
        return self.kernel

    def multiplied(self, kernel, layer, x, bias):
        """Trimmed where the output's last block is partial."""
        return self.fmt.apply(layer, x, bias, kernel.apply_weights)

    def sliced_tensors(self) -> list[SlicedTensor]:
        """Scales are ``[output blocks, 1, input blocks, 1]``."""
        one = Window.whole(1)
        return [
            replace(each, windows=(each.windows[0], one, each.windows[1], one))
            if each.kind == "scale"
            else each
            for each in super().sliced_tensors()
        ]


def blocks(config) -> list[int] | None:
    """Only a mixed config has experts in blocks, which it describes as plain FP8."""
    of_experts = getattr(config, "fp8_block_config", None)
    if of_experts is None or not config.has_blocked_weights():
        return None
    return of_experts.weight_block_size


def linear(layer, method):
    if type(method) is not ModelOptLinearMethod:
        return method
    if not isinstance(method.wkey, KFp8Block128):
        return method
    return cut_or_stock(CutModelOptLinearMethod, method, BLOCKS, layer)


FORMAT = CheckpointFormat(blocks, fp8.EXPERTS, linear)
