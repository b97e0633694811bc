"""vLLM's quantization configs of block-FP8 checkpoints, by format."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_patch.patch_table import PATCHES

MODELS = Path(__file__).parent.parent / "models"


@dataclass(frozen=True)
class Format:
    """A format as these tests know it.

    Attributes:
        row: Its row in the patch table.
        source: What its config.json says, or the file in ``MODELS``.
        scale: What the name of a weight's scales ends with.
        cut_linear: Class of ours for linear layers.
        cut_experts: Class of ours for experts.
        shape: Makes a checkpoint's scales of ``[row blocks, column blocks]``.

    """

    row: str
    source: dict | str
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
    def path(self) -> Path:
        return MODELS / f"{self.source}.json"

    def config(self) -> dict:
        if isinstance(self.source, dict):
            return self.source
        return json.loads(self.path.read_text())["quantization_config"]

    @property
    def is_in_release(self) -> bool:
        import vllm

        (row,) = (patch for patch in PATCHES if patch.name == self.row)
        return row.is_of(vllm.__version__)


FORMATS = {
    "compressed-tensors": Format(
        "compressed-tensors",
        "qwen3_moe_1536_compressed_tensors",
        cut_linear="CutCompressedTensorsLinearMethod",
        cut_experts="CutCompressedTensorsMoEMethod",
    ),
    "quark": Format(
        "quark",
        "qwen3_moe_1536_quark",
        cut_linear="CutQuarkLinearMethod",
        cut_experts="CutQuarkMoEMethod",
    ),
    "modelopt": Format(
        "modelopt",
        "qwen3_2432_modelopt",
        cut_linear="CutModelOptLinearMethod",
        shape=lambda scale: scale[:, None, :, None],
    ),
    "modelopt-mixed": Format(
        "modelopt-mixed",
        "qwen3_moe_1536_modelopt_mixed",
        scale="weight_scale_inv",
        cut_experts="CutFp8MoEMethod",
    ),
    "inc": Format(
        "inc",
        "qwen3_2432_auto_round",
        scale="weight_scale_inv",
        cut_linear="CutFp8LinearMethod",
    ),
}
