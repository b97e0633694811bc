# SPDX-License-Identifier: Apache-2.0
"""The tensors that a config.json implies, for want of the checkpoint's headers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm_patch.cli import UsageError
from vllm_patch.cli.check.checkpoint import Tensor
from vllm_patch.cli.check.quantization import FUSED, IN_BLOCKS, Quantization
from vllm_patch.cli.model_config import is_unknown_size

# Most that a field may say, so that nobody waits for nonsense.
MOST_LAYERS, MOST = 4096, 1 << 24
FILE = "config.json"
EXPERTS = "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"
SHARED = "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"
EXPERT_PARTS = "gate_proj", "up_proj", "gate_up_proj", "down_proj"
# Fields of models whose layers are not all made alike, in ways unknown here.
OTHERS = "use_cla", "hybrid_override_pattern"
# Hunyuan's shared experts, as wide as dense layers, and whether it has them.
HUNYUAN_SHARED, MIXED_MLP = "num_shared_expert", "use_mixed_mlp_moe"


@dataclass
class Derived:
    """Tensors of a language model, by its config alone.

    Attributes:
        text: The language model's fields.
        quantization: What is in blocks.
        tensors: Name -> tensor, of the decoder's linear layers.
        unknown: Fields that look like sizes and are of layers nobody here knows, and
            what config.json does not tell of which layers are in blocks.

    """

    text: dict[str, Any]
    quantization: Quantization
    tensors: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def linear(self, name: str, *shape: int) -> None:
        """Add a module's weight ``[..., rows, columns]``, with scales if in blocks."""
        if not self.quantization.takes(name):
            self.tensors[f"{name}.weight"] = Tensor("BF16", shape, FILE)
            return
        rows, columns = self.quantization.block
        blocks = *shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)
        self.tensors[f"{name}.weight"] = Tensor("F8_E4M3", shape, FILE)
        self.tensors[f"{name}.weight_scale_inv"] = Tensor("F32", blocks, FILE)

    def size(self, *names: str, most: int = MOST) -> int:
        """Return the first of some fields that is set, or 0.

        Raises:
            UsageError: It is no size.

        """
        for name in names:
            value = self.text.get(name)
            if value is None:
                continue
            if isinstance(value, list) and len({*map(str, value)}) == 1:
                value = value[0]
            if type(value) is not int or not 0 <= value <= most:
                raise UsageError(
                    f"config.json has {name} = {str(value)[:80]}, which is no number "
                    f"from 0 to {most}. Compare it with the published one."
                )
            return value
        return 0

    def needed(self, *names: str, most: int = MOST) -> int:
        """Return such a field, or raise UsageError if there is none."""
        if value := self.size(*names, most=most):
            return value
        raise UsageError(
            f"config.json has no {' or '.join(names)}, by which layers could be told. "
            "Give the checkpoint's folder or hub id."
        )


def tensors(text: dict[str, Any], quantization: Quantization) -> Derived:
    """Return the decoder's linear layers as config.json has them.

    Args:
        text: The language model's fields.
        quantization: Which of them are in blocks.

    Raises:
        UsageError: A size is missing or is none.

    """
    model = Derived(text, quantization)
    experts = model.size(*EXPERTS, most=1 << 16)
    dense = [*_dense_layers(model)] if experts else None
    for layer in range(model.needed("num_hidden_layers", most=MOST_LAYERS)):
        name = f"model.layers.{layer}"
        _attention(model, layer, name)
        if dense is None or dense[layer]:
            # MiniMax-M3 has the other name for its experts.
            size = model.needed("dense_intermediate_size", "intermediate_size")
            _mlp(model, f"{name}.mlp", size)
        else:
            _experts(model, f"{name}.mlp", experts)
    model.unknown = [
        f"{key} = {str(value)[:40]}"
        for key, value in text.items()
        if value and (key in OTHERS or is_unknown_size(key))
    ]
    if text.get(HUNYUAN_SHARED) and MIXED_MLP not in text:
        model.unknown.append(f"{HUNYUAN_SHARED} = {str(text[HUNYUAN_SHARED])[:40]}")
    model.unknown += [*quantization.untold, *_unplaced(model)]
    return model


def _unplaced(model: Derived) -> Iterator[str]:
    """Say what vLLM may match otherwise, or that nothing is in blocks."""
    quantization = model.quantization
    modules = [name.removesuffix(".weight") for name in model.tensors]
    if quantization.listed:
        in_blocks = {n for n, a in quantization.listed.items() if a in IN_BLOCKS}
        if left := sorted(in_blocks - {*_placed(quantization.listed, modules)}):
            yield f"quantized_layers: {left[0][:80]}"
    partly = (module for module in modules if _is_partly_named(quantization, module))
    if module := next(partly, None):
        yield f"{module}: left out by a part of its name, or by a pattern"
    if quantization.block and not any(map(quantization.takes, modules)):
        yield "layers in FP8 blocks: config.json names none of those that it implies"


def _placed(listed: dict[str, str], modules: list[str]) -> Iterator[str]:
    """Yield names of ModelOpt's list that are of modules, or of what vLLM makes one."""
    experts = {
        name.partition(".experts.")[0] for name in modules if ".experts." in name
    }
    yield from modules
    yield from (f"{parent}.experts" for parent in experts)
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        yield from (f"{parent}.{one}" for one, of in FUSED.items() if leaf in of)
    for name in listed:
        parent, is_child, _ = name.partition(".experts.")
        if not is_child:
            parent, _, leaf = name.rpartition(".")
            is_child = leaf in EXPERT_PARTS
        if is_child and parent in experts:
            yield name


def _is_partly_named(quantization: Quantization, module: str) -> bool:
    """Whether a module is left out, and not by its name, to which vLLM keeps here."""
    if quantization.format != "fp8" or not quantization.unquantized.has(module):
        return False
    # That of a layer's experts stands for all of them.
    experts, _, _ = module.partition(".experts.")
    return not quantization.unquantized.names & {module, f"{experts}.experts"}


def _mlp(model: Derived, name: str, size: int) -> None:
    hidden = model.needed("hidden_size")
    for leaf in ("gate_proj", "up_proj"):
        model.linear(f"{name}.{leaf}", size, hidden)
    model.linear(f"{name}.down_proj", hidden, size)


def _experts(model: Derived, name: str, experts: int) -> None:
    hidden = model.needed("hidden_size")
    # Mixtral and MiniMax use the dense model's name.
    size = model.needed("moe_intermediate_size", "intermediate_size")
    # As one tensor for each role.
    model.linear(f"{name}.experts.gate_up_proj", experts, 2 * size, hidden)
    model.linear(f"{name}.experts.down_proj", experts, hidden, size)
    count = model.size(*SHARED)
    if shared := model.size("shared_expert_intermediate_size", "share_expert_dim"):
        _mlp(model, f"{name}.shared_expert", shared)
    elif count:
        each = model.size("moe_shared_expert_intermediate_size") or size
        _mlp(model, f"{name}.shared_experts", count * each)
    elif model.text.get(MIXED_MLP) and (count := model.size(HUNYUAN_SHARED)):
        _mlp(model, f"{name}.shared_mlp", count * model.needed("intermediate_size"))


def _dense_layers(model: Derived) -> Iterator[bool]:
    """Tell of each layer of a model with experts whether it has none."""
    text, layers = model.text, model.needed("num_hidden_layers", most=MOST_LAYERS)
    kinds = text.get("mlp_layer_types")
    listed = text.get("mlp_only_layers") or ()
    # Step writes "3,4,5".
    sparse = text.get("moe_layers_enum")
    if isinstance(sparse, str):
        sparse = [int(n) for n in sparse.split(",") if n.strip().isdecimal()]
    first = model.size(
        "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"
    )
    each = text.get("moe_layer_freq")
    step = model.size("decoder_sparse_step", "moe_layer_interval") or 1
    last = text.get("moe_layer_end_index")
    for layer in range(layers):
        if isinstance(kinds, list) and layer < len(kinds):
            yield kinds[layer] == "dense"
        elif isinstance(sparse, list):
            yield layer not in sparse
        elif isinstance(each, list) and layer < len(each):
            yield not each[layer]
        else:
            is_after = type(last) is int and 0 <= last < layer
            is_after |= type(each) is int and each > 1 and layer % each != 0
            is_listed = isinstance(listed, list) and layer in listed
            yield is_listed or layer < first or (layer + 1) % step != 0 or is_after


def _attention(model: Derived, layer: int, name: str) -> None:
    text = model.text
    if _is_linear_attention(model, layer):
        _linear_attention(model, f"{name}.linear_attn")
    elif text.get("kv_lora_rank"):
        _latent_attention(model, f"{name}.self_attn")
    else:
        _grouped_attention(model, f"{name}.self_attn", text, layer)


def _grouped_attention(
    model: Derived, name: str, text: dict[str, Any], layer: int
) -> None:
    hidden, heads = model.needed("hidden_size"), model.needed("num_attention_heads")
    kv_heads = model.size("num_key_value_heads", "num_attention_groups") or heads
    head = model.size("head_dim") or hidden // heads
    kinds, other = text.get("layer_types"), text.get("attention_other_setting")
    kind = kinds[layer] if isinstance(kinds, list) and layer < len(kinds) else None
    if kind and isinstance(other, dict) and kind == other.get("attention_type"):
        # Step's layers with a sliding window have heads of their own.
        own = Derived(other, model.quantization)
        heads = own.needed("num_attention_heads")
        kv_heads = own.size("num_attention_groups") or kv_heads
    gate = 1 + _has_output_gate(text)
    model.linear(f"{name}.q_proj", gate * heads * head, hidden)
    for leaf in ("k_proj", "v_proj"):
        model.linear(f"{name}.{leaf}", kv_heads * head, hidden)
    model.linear(f"{name}.o_proj", hidden, heads * head)


def _has_output_gate(text: dict[str, Any]) -> bool:
    """Whether q holds a gate of its output, too, as in Qwen3-Next."""
    is_next = str(text.get("model_type")).startswith(("qwen3_next", "qwen3_5"))
    return is_next and text.get("attn_output_gate") is not False


def _latent_attention(model: Derived, name: str) -> None:
    hidden, heads = model.needed("hidden_size"), model.needed("num_attention_heads")
    nope, rope = model.needed("qk_nope_head_dim"), model.size("qk_rope_head_dim")
    value, kv_rank = model.needed("v_head_dim"), model.needed("kv_lora_rank")
    if q_rank := model.size("q_lora_rank"):
        model.linear(f"{name}.q_a_proj", q_rank, hidden)
        model.linear(f"{name}.q_b_proj", heads * (nope + rope), q_rank)
    else:
        model.linear(f"{name}.q_proj", heads * (nope + rope), hidden)
    model.linear(f"{name}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
    model.linear(f"{name}.kv_b_proj", heads * (nope + value), kv_rank)
    model.linear(f"{name}.o_proj", hidden, heads * value)


def _is_linear_attention(model: Derived, layer: int) -> bool:
    kinds = model.text.get("layer_types")
    if isinstance(kinds, list) and layer < len(kinds):
        return kinds[layer] == "linear_attention"
    every = model.size("full_attention_interval")
    if not every and "linear_num_value_heads" in model.text:
        every = 4
    return bool(every) and (layer + 1) % every != 0


def _linear_attention(model: Derived, name: str) -> None:
    hidden = model.needed("hidden_size")
    keys, values = (
        model.needed(f"linear_num_{part}_heads")
        * model.needed(f"linear_{part}_head_dim")
        for part in ("key", "value")
    )
    if model.text.get("model_type") == "qwen3_next":
        model.linear(f"{name}.in_proj_qkvz", 2 * keys + 2 * values, hidden)
    else:
        model.linear(f"{name}.in_proj_qkv", 2 * keys + values, hidden)
        model.linear(f"{name}.in_proj_z", values, hidden)
    model.linear(f"{name}.out_proj", hidden, values)
