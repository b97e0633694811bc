# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face config.json says about FP8 blocks and sizes of layers."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_patch.cli import UsageError
from vllm_patch.cli.block_format import FORMATS, BlockFormat, format_of

NEEDED = "vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"
# A name like those of MLPs' sizes, and those whose meaning is known.
SIZE = re.compile(
    r".*(intermediate|expert|ffn|inner|mlp)\w*_(size|dim|mlp)|n_inner|d_ff"
)
MLP_SIZES = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "share_expert_dim",
)
# Of none that is cut.
OTHER_SIZES = ("intermediate_size_per_layer_input",)


@dataclass(frozen=True)
class ModelConfig:
    """A config.json of a block-FP8 model, as a dict, with what is asked of it."""

    path: Path
    fields: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "ModelConfig":
        """Read and check ``path``; raise UsageError if it cannot be used."""
        try:
            fields = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path}: {error}. Give the config.json of a block-FP8 model."
            ) from error
        if not isinstance(fields, dict):
            raise UsageError(
                f"{path} holds no JSON object, so it is no model's config."
            )
        config = cls(path, fields)
        config._check_quantization()
        config._check_sizes()
        return config

    @property
    def text(self) -> dict[str, Any]:
        """The language model's fields, which multimodal models nest."""
        return self.fields.get("text_config", self.fields)

    @property
    def quantization(self) -> dict[str, Any]:
        return self.fields.get("quantization_config") or {}

    @property
    def block_format(self) -> BlockFormat | None:
        return format_of(self.quantization)

    @property
    def block(self) -> int:
        return self.block_format.blocks(self.quantization)[0]

    @property
    def vocab_size(self) -> int:
        return self.text["vocab_size"]

    def with_layers(self, layers: int) -> "ModelConfig":
        """Return the config with only the first ``layers`` layers."""
        available = self.text["num_hidden_layers"]
        if not 1 <= layers <= available:
            raise UsageError(
                f"--layers {layers}: {self.path} has {available} layers; "
                f"give 1 to {available}."
            )
        kinds = {
            name: self.text[name][:layers]
            for name in ("layer_types", "mlp_layer_types")
            if self.text.get(name)
        }
        return self._with_text(num_hidden_layers=layers, **kinds)

    def _with_text(self, **changes: Any) -> "ModelConfig":
        text = {**self.text, **changes}
        nested = {**self.fields, "text_config": text}
        return ModelConfig(self.path, nested if "text_config" in self.fields else text)

    @property
    def mlp_sizes(self) -> dict[str, int]:
        """Sizes of MLPs and experts, by config field; not all are of some layer."""
        return {name: size for name in MLP_SIZES if (size := self.text.get(name))}

    def widened(self, tp: int) -> "ModelConfig":
        """Return the config with MLPs and experts that ``tp`` leaves in whole blocks.

        With zeros in the added columns, the model computes the same.
        """
        unit = tp * self.block
        changes = {name: -(-n // unit) * unit for name, n in self.mlp_sizes.items()}
        return self._with_text(**changes)

    def _check_quantization(self) -> None:
        block_format = self.block_format
        block = block_format and block_format.blocks(self.quantization)
        if not block:
            raise UsageError(
                f"{self.path} has quant_method = "
                f"{self.quantization.get('quant_method')!r} and no FP8 blocks that "
                f"parity knows; it needs a quantization_config of {', '.join(FORMATS)} "
                "with FP8 weights in blocks, such as quant_method 'fp8' and "
                "weight_block_size [128, 128]."
            )
        if block[0] != block[1]:
            raise UsageError(
                f"{self.path} has quant blocks of {block}; blocks must be square."
            )

    def _check_numbers(self, sizes: dict[str, Any]) -> None:
        for name, size in sizes.items():
            if not isinstance(size, int) or size <= 0:
                raise UsageError(f"{self.path} has {name} = {size!r}; give a number.")

    def _check_sizes(self) -> None:
        """Refuse what would be judged by sizes that are not there or not known."""
        self._check_numbers({name: self.text.get(name) for name in NEEDED})
        self._check_numbers(self.mlp_sizes)
        unknown = [
            f"{name} = {size}"
            for name, size in self.text.items()
            if size and is_unknown_size(name)
        ]
        if unknown or not self.mlp_sizes:
            raise UsageError(
                f"{self.path} has {', '.join(unknown) or 'no intermediate_size'}: "
                "parity does not know of which layers, so not what a TP size cuts. "
                f"It knows {', '.join(MLP_SIZES)}."
            )


def is_unknown_size(name: str) -> bool:
    """Whether a field looks like the size of layers, and nobody here knows of which."""
    return bool(SIZE.fullmatch(name)) and name not in (*MLP_SIZES, *OTHER_SIZES)
