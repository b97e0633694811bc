"""The format of the checkpoint that layers are built for."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.quantized import BLOCK
from vllm_patch.cli.block_format import BlockFormat, format_of


@dataclass(frozen=True)
class Checkpoint:
    """What a config.json says of quantization, which vLLM makes a config of.

    Attributes:
        quantization: Its ``quantization_config``.

    """

    quantization: dict

    @classmethod
    def of(cls, config: str) -> "Checkpoint":
        """Return that of a file."""
        return cls(json.loads(Path(config).read_text())["quantization_config"])

    @property
    def block_format(self) -> BlockFormat:
        return format_of(self.quantization)

    def quant_config(self):
        from vllm.model_executor.layers.quantization import get_quantization_config

        name = self.block_format.config or self.quantization["quant_method"]
        return get_quantization_config(name).from_config(self.quantization)

    def scales(self, layer: torch.nn.Module, weight: str) -> torch.nn.Parameter:
        """Return the block scales of ``weight``, or of ``w13_weight``."""
        suffix = self.block_format.scale.removeprefix("weight")
        return getattr(layer, f"{weight}{suffix}")


FP8 = Checkpoint(
    {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
)
