# SPDX-License-Identifier: Apache-2.0
"""How checkpoints of each format say that their weights are FP8 in quant blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BlockFormat:
    """A ``quant_method`` of config.json's quantization_config.

    Attributes:
        blocks: Takes the quantization_config; returns rows and columns of a quant
            block, or None if weights are not FP8 in blocks.
        unquantized: Its field with the modules that are left in bfloat16.
        scale: What a module's block scales are called.
        scale_dims: Dimensions of the scales; those beyond two are 1.

    """

    blocks: Callable[[dict[str, Any]], list[int] | None]
    unquantized: str
    scale: str = "weight_scale"
    scale_dims: int = 2

    def stored(self, scale: "torch.Tensor") -> "torch.Tensor":
        """Return scales ``[row blocks, column blocks]`` as the format stores them."""
        return scale[:, None, :, None] if self.scale_dims == 4 else scale


def _compressed_tensors(quantization: dict[str, Any]) -> list[int] | None:
    groups = quantization.get("config_groups", {}).values()
    weights = [group.get("weights") or {} for group in groups]
    fp8 = [w for w in weights if (w.get("type"), w.get("num_bits")) == ("float", 8)]
    return next((w["block_structure"] for w in fp8 if w.get("block_structure")), None)


def _quark(quantization: dict[str, Any]) -> list[int] | None:
    weight = quantization.get("global_quant_config", {}).get("weight") or {}
    return weight.get("block_size") if weight.get("dtype") == "fp8_e4m3" else None


def _modelopt(quantization: dict[str, Any]) -> list[int] | None:
    return [128, 128] if quantization.get("quant_algo") == "FP8_PB_WO" else None


FORMATS = {
    "fp8": BlockFormat(
        lambda quantization: quantization.get("weight_block_size"),
        unquantized="modules_to_not_convert",
        scale="weight_scale_inv",
    ),
    "compressed-tensors": BlockFormat(_compressed_tensors, unquantized="ignore"),
    "quark": BlockFormat(_quark, unquantized="exclude"),
    "modelopt": BlockFormat(_modelopt, unquantized="ignore", scale_dims=4),
}
