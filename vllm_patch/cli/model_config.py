# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face config.json says about FP8 blocks and tensor parallelism."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_patch.cli import UsageError
from vllm_patch.cli.block_format import FORMATS, BlockFormat, format_of

NEEDED = "vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"
EXPERTS = "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"
# What says, if it is neither 0 nor empty, that some layers are dense.
DENSE_LAYERS = (
    "first_k_dense_replace",
    "moe_layer_start_index",
    "mlp_only_layers",
    "num_dense_layers",
)
# And if it is not 1.
SPARSE_STEPS = "decoder_sparse_step", "moe_layer_freq", "moe_layer_interval"
# A name like those of MLPs' sizes, of which `_mlp_fields` knows some.
SIZE = re.compile(
    r".*(intermediate|expert|ffn|inner|mlp)\w*_(size|dim|mlp)|n_inner|d_ff"
)


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
    def _expert_field(self) -> str | None:
        """Name of the size of a routed expert, or None without experts."""
        if self.text.get("moe_intermediate_size"):
            return "moe_intermediate_size"
        # Mixtral and MiniMax use the dense model's name.
        has_experts = any(self.text.get(name) for name in EXPERTS)
        return "intermediate_size" if has_experts else None

    @property
    def _has_dense_layers(self) -> bool:
        text, layers = self.text, self.text["num_hidden_layers"]
        return (
            self._expert_field is None
            or any(text.get(name) for name in DENSE_LAYERS)
            or any(text.get(name) not in (None, 1) for name in SPARSE_STEPS)
            or "dense" in (text.get("mlp_layer_types") or ())
            or 0 <= text.get("moe_layer_end_index", -1) < layers - 1
        )

    @property
    def _mlp_fields(self) -> set[str]:
        """Names of the sizes in use; some shared experts have that of routed ones."""
        fields = {self._expert_field, "shared_expert_intermediate_size"}
        if self.text.get("num_shared_experts") == 1:  # More are one of a larger size.
            fields.add("moe_shared_expert_intermediate_size")
        return fields | ({"intermediate_size"} if self._has_dense_layers else set())

    @property
    def mlp_sizes(self) -> dict[str, int]:
        """Intermediate sizes that tensor parallelism divides, by config field."""
        fields = self._mlp_fields
        return {n: size for n, size in self.text.items() if n in fields and size}

    def undivided(self, tp: int) -> str | None:
        """Return what cannot be shared out evenly among ``tp`` ranks, or None."""
        for name, size in self.mlp_sizes.items():
            if size % tp:
                return f"{name} = {size}"
        heads = self.text["num_attention_heads"]
        if heads % tp:
            return f"num_attention_heads = {heads}"
        kv_heads = self.text.get("num_key_value_heads", tp)
        # More ranks than KV heads share them.
        if max(kv_heads, tp) % min(kv_heads, tp):
            return f"num_key_value_heads = {kv_heads}"
        if (rows := -(-self.vocab_size // 64) * 64) % tp:
            return f"vocab_size = {self.vocab_size}, which vLLM rounds up to {rows}"
        return None

    def cuts(self, tp: int) -> bool:
        """Whether ``tp`` cuts a layer inside a quant block."""
        return bool(self._cut_mlps(tp)) or self.cuts_attention(tp)

    def cuts_experts_only(self, tp: int) -> bool:
        """Whether what ``tp`` cuts is routed experts and nothing else."""
        text = self.text
        shared = any(text[name] for name in text if name.endswith("shared_experts"))
        is_experts = list(self._cut_mlps(tp)) == [self._expert_field]
        return is_experts and not shared and not self.cuts_attention(tp)

    def cuts_attention(self, tp: int) -> bool:
        """Whether ``tp`` cuts a projection of the attention inside a quant block."""
        return any(size % self.block for size in self._attention_sizes(tp))

    def widened(self, tp: int) -> "ModelConfig":
        """Return the config with MLPs and experts that ``tp`` leaves in whole blocks.

        With zeros in the added columns, the model computes the same.
        """
        unit = tp * self.block
        changes = {
            name: -(-size // unit) * unit for name, size in self._cut_mlps(tp).items()
        }
        return self._with_text(**changes)

    def _cut_mlps(self, tp: int) -> dict[str, int]:
        unit = tp * self.block
        return {name: size for name, size in self.mlp_sizes.items() if size % unit}

    def _attention_sizes(self, tp: int) -> list[float]:
        """Return what a rank holds of each projection; fractions count as cut."""
        text = self.text
        heads = text["num_attention_heads"]
        if "kv_lora_rank" in text:
            nope, rope = text["qk_nope_head_dim"], text["qk_rope_head_dim"]
            value = text["v_head_dim"]
            return [heads / tp * size for size in (nope + rope, nope + value, value)]
        head = text.get("head_dim") or text["hidden_size"] / heads
        kv_heads = text.get("num_key_value_heads", heads)
        return [heads * head / tp, max(kv_heads / tp, 1) * head]

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
        known = {*self._mlp_fields, "intermediate_size"}
        unknown = [
            f"{name} = {size}"
            for name, size in self.text.items()
            if SIZE.fullmatch(name) and size and name not in known
        ]
        if unknown or not self.mlp_sizes:
            raise UsageError(
                f"{self.path} has {', '.join(unknown) or 'no intermediate_size'}: "
                "parity does not know of which layers, so not what a TP size cuts. "
                f"It knows {', '.join(sorted(filter(None, known)))}."
            )
