"""vLLM's quantization configs of block-FP8 checkpoints, by format."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from vllm_patch.patch_table import PATCHES

FP8_BLOCKS = {
    "num_bits": 8,
    "type": "float",
    "strategy": "block",
    "block_structure": [128, 128],
    "symmetric": True,
    "dynamic": False,
}
FP8_GROUPS = {
    "num_bits": 8,
    "type": "float",
    "strategy": "group",
    "group_size": 128,
    "symmetric": True,
    "dynamic": True,
}


def compressed_tensors(inputs: dict | None) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": dict(FP8_BLOCKS),
                "input_activations": inputs and dict(inputs),
            }
        },
    }


def quark() -> dict:
    fp8 = {"dtype": "fp8_e4m3", "symmetric": True}
    return {
        "quant_method": "quark",
        "export": {"kv_cache_group": [], "pack_method": "reorder"},
        "exclude": ["lm_head"],
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "global_quant_config": {
            "weight": {
                **fp8,
                "is_dynamic": False,
                "qscheme": "per_block",
                "block_size": [128, 128],
            },
            "input_tensors": {
                **fp8,
                "is_dynamic": True,
                "qscheme": "per_group",
                "group_size": 128,
            },
        },
    }


MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "ignore": []}
INC = {
    "quant_method": "auto-round",
    "bits": 8,
    "group_size": [128, 128],
    "sym": True,
    "data_type": "fp",
    "act_bits": 8,
    "act_dynamic": True,
}


def modelopt_mixed() -> dict:
    quantized = {"model.layers.0.mlp.experts": {"quant_algo": "FP8_PB_WO"}}
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": quantized,
        "ignore": [],
    }


@dataclass(frozen=True)
class Format:
    """A format as these tests know it.

    Attributes:
        row: Its row in the patch table.
        config: What its config.json says.
        scale: What the name of a weight's scales ends with.
        cut_linear: Class of ours for linear layers.
        cut_experts: Class of ours for experts.
        shape: Makes a checkpoint's scales of ``[row blocks, column blocks]``.

    """

    row: str
    config: Callable[[], dict]
    scale: str = "weight_scale"
    cut_linear: str = ""
    cut_experts: str = ""
    shape: Callable = lambda scale: scale

    def quant_config(self):
        """Return what vLLM makes of the config; a vLLM config must be set."""
        (row,) = (patch for patch in PATCHES if patch.name == self.row)
        name = row.attribute.partition(".")[0]
        if self.row == "modelopt":
            name = "ModelOptFp8Config"
        return getattr(importlib.import_module(row.module), name).from_config(
            self.config()
        )

    @property
    def is_in_release(self) -> bool:
        import vllm

        (row,) = (patch for patch in PATCHES if patch.name == self.row)
        return row.is_of(vllm.__version__)


FORMATS = {
    "compressed-tensors": Format(
        "compressed-tensors",
        lambda: compressed_tensors(FP8_GROUPS),
        cut_linear="CutCompressedTensorsLinearMethod",
        cut_experts="CutCompressedTensorsMoEMethod",
    ),
    "quark": Format(
        "quark",
        quark,
        cut_linear="CutQuarkLinearMethod",
        cut_experts="CutQuarkMoEMethod",
    ),
    "modelopt": Format(
        "modelopt",
        lambda: dict(MODELOPT),
        cut_linear="CutModelOptLinearMethod",
        shape=lambda scale: scale[:, None, :, None],
    ),
    "modelopt-mixed": Format(
        "modelopt-mixed",
        modelopt_mixed,
        scale="weight_scale_inv",
        cut_experts="CutFp8MoEMethod",
    ),
    "inc": Format(
        "inc",
        lambda: dict(INC),
        scale="weight_scale_inv",
        cut_linear="INCLinearMethod",
    ),
}
