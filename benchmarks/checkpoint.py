"""The format of the checkpoint that layers are built for."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.quantized import BLOCK
from vllm_patch.cli.block_format import FORMATS, BlockFormat


@dataclass(frozen=True)
class Checkpoint:
    """What a config.json says of quantization, which vLLM makes a config of.

    Attributes:
        quantization: Its ``quantization_config``.
        method: vLLM's name of the config, if it is not the ``quant_method``.

    """

    quantization: dict
    method: str = ""

    @classmethod
    def of(cls, config: str) -> "Checkpoint":
        """Return that of a file, or of ``OTHERS``."""
        if config in OTHERS:
            return OTHERS[config]
        return cls(json.loads(Path(config).read_text())["quantization_config"])

    @property
    def block_format(self) -> BlockFormat:
        # The others describe their layers as plain FP8 to vLLM.
        name = "fp8" if self.method else self.quantization["quant_method"]
        return FORMATS[name]

    def quant_config(self):
        from vllm.model_executor.layers.quantization import get_quantization_config

        name = self.method or self.quantization["quant_method"]
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
# Those that parity writes no checkpoints of.
OTHERS = {
    "inc": Checkpoint(
        {
            "quant_method": "auto-round",
            "bits": 8,
            "group_size": [BLOCK, BLOCK],
            "sym": True,
            "data_type": "fp",
            "act_bits": 8,
            "act_dynamic": True,
        },
        method="inc",
    ),
    "modelopt-mixed": Checkpoint(
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                "model.layers.0.mlp.experts": {"quant_algo": "FP8_PB_WO"}
            },
            "ignore": [],
        },
        method="modelopt_mixed",
    ),
}
