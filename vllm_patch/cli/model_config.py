# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face config.json says about FP8 blocks and tensor parallelism."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_patch.cli.errors import UsageError


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
        except OSError as error:
            raise UsageError(
                f"{path}: {error.strerror}. Give the config.json of a block-FP8 model."
            ) from error
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path} is not JSON ({error}). Give the config.json of a block-FP8 "
                "model."
            ) from error
        if not isinstance(fields, dict):
            raise UsageError(
                f"{path} holds no JSON object, so it is no model's config."
            )
        config = cls(path, fields)
        config._check_quantization()
        return config

    @property
    def text(self) -> dict[str, Any]:
        """The language model's fields, which multimodal models nest."""
        return self.fields.get("text_config", self.fields)

    @property
    def block(self) -> int:
        return self.fields["quantization_config"]["weight_block_size"][0]

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
        changes = {"num_hidden_layers": layers}
        if self.text.get("layer_types"):
            changes["layer_types"] = self.text["layer_types"][:layers]
        return self._with_text(**changes)

    def _with_text(self, **changes: Any) -> "ModelConfig":
        text = {**self.text, **changes}
        nested = {**self.fields, "text_config": text}
        return ModelConfig(self.path, nested if "text_config" in self.fields else text)

    @property
    def expert_size(self) -> int | None:
        """Intermediate size of one routed expert, or None without experts."""
        return self.text[self._expert_field] if self._expert_field else None

    @property
    def _expert_field(self) -> str | None:
        if "moe_intermediate_size" in self.text:
            return "moe_intermediate_size"
        # Mixtral and MiniMax use the dense model's name.
        return "intermediate_size" if "num_local_experts" in self.text else None

    def with_expert_size(self, size: int) -> "ModelConfig":
        """Return the config with experts of ``size`` columns."""
        return self._with_text(**{self._expert_field: size})

    @property
    def _has_dense_layers(self) -> bool:
        text = self.text
        return (
            self.expert_size is None
            or text.get("first_k_dense_replace", 0) > 0
            or bool(text.get("mlp_only_layers"))
            or text.get("decoder_sparse_step", 1) > 1
        )

    @property
    def mlp_sizes(self) -> dict[str, int]:
        """Intermediate sizes that tensor parallelism divides, by config field.

        Shared experts of some models are a multiple of the routed ones' field.
        """
        fields = {self._expert_field, "shared_expert_intermediate_size"}
        if self._has_dense_layers:
            fields.add("intermediate_size")
        return {name: self.text[name] for name in self.text if name in fields}

    def undivided(self, tp: int) -> str | None:
        """Return what cannot be shared out evenly among ``tp`` ranks, or None."""
        for name, size in self.mlp_sizes.items():
            if size and size % tp:
                return f"{name} = {size}"
        heads = self.text.get("num_attention_heads", tp)
        if heads % tp:
            return f"num_attention_heads = {heads}"
        kv_heads = self.text.get("num_key_value_heads", tp)
        # More ranks than KV heads share them.
        if max(kv_heads, tp) % min(kv_heads, tp):
            return f"num_key_value_heads = {kv_heads}"
        return None

    def cuts(self, tp: int) -> bool:
        """Whether ``tp`` cuts a layer inside a quant block."""
        return bool(self._cut_mlps(tp)) or self.cuts_attention(tp)

    def cuts_experts_only(self, tp: int) -> bool:
        """Whether what ``tp`` cuts is routed experts and nothing else."""
        shared = self.text.get("n_shared_experts")
        fields = list(self._cut_mlps(tp))
        return (
            fields == [self._expert_field]
            and not shared
            and not self.cuts_attention(tp)
        )

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
        heads = text.get("num_attention_heads", 0)
        if "kv_lora_rank" in text:
            nope, rope = text["qk_nope_head_dim"], text["qk_rope_head_dim"]
            value = text["v_head_dim"]
            return [heads / tp * size for size in (nope + rope, nope + value, value)]
        head = text.get("head_dim") or text.get("hidden_size", 0) / max(heads, 1)
        kv_heads = text.get("num_key_value_heads", heads)
        return [heads * head / tp, max(kv_heads / tp, 1) * head]

    def _check_quantization(self) -> None:
        quantization = self.fields.get("quantization_config") or {}
        method = quantization.get("quant_method")
        block = quantization.get("weight_block_size")
        if method != "fp8" or not block:
            raise UsageError(
                f"{self.path} has quant_method = {method!r} and weight_block_size = "
                f"{block!r}; parity needs a block-FP8 model (quant_method 'fp8', "
                "weight_block_size such as [128, 128])."
            )
        if block[0] != block[1]:
            raise UsageError(
                f"{self.path} has weight_block_size = {block}; blocks must be square."
            )
