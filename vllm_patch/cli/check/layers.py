# SPDX-License-Identifier: Apache-2.0
"""The quantized layers that vLLM builds from a checkpoint's tensors."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_patch.cli import UsageError
from vllm_patch.cli.check.checkpoint import Tensor
from vllm_patch.cli.check.quantization import Quantization
from vllm_patch.fp8_tp_padding.slices.shard import BlockShard, block_shard

# What follows a module's name in that of its scales.
SCALES = "weight_scale_inv", "weight_scale"
# Types of models of which vLLM's own code rounds layers up to whole blocks, or experts
# to a least size, each by a rule of its own.
PAD_THEMSELVES = (
    "deepseek_v4",
    "deepseek_v41",
    "dots3_note",
    "bailing_hybrid",
    "kimi_k3",
)
# vLLM's layer -> tensors that it merges, in the order of its output.
MERGED = {
    "qkv_proj": [("q_proj", "k_proj", "v_proj")],
    "gate_up_proj": [("gate_proj", "up_proj"), ("w1", "w3")],
    "in_proj_qkvz": [("in_proj_qkv", "in_proj_z")],
    "fused_qkv_a_proj": [("q_a_proj", "kv_a_proj_with_mqa")],
}
ROW = "o_proj", "down_proj", "w2", "out_proj"
COLUMN = "q_b_proj", "kv_b_proj", "in_proj_qkvz", "g_proj"
REPLICATED = "q_a_proj", "kv_a_proj_with_mqa"
# Rows or columns that no layer has; more are not waited for.
MOST = 1 << 22
# Modules of which each rank has all.
WHOLE = ("indexer",)
# Roles of an expert's tensors, by name.
EXPERT = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up"}
EXPERT |= {"down_proj": "down", "w2": "down", "gate_up_proj": "both"}
_EXPERT = re.compile(r"(.*experts)\.(\d{1,7})")
# Of the language model's decoder; other towers have numbers and heads of their own.
_DECODER = "model|language_model|text_model|thinker|llm|transformer|decoder|backbone"
_LAYER = re.compile(rf"(?:(?:{_DECODER})\.)*layers\.(\d{{1,7}})\.")


@dataclass(frozen=True)
class Dimension:
    """A dimension of a weight, and how ranks share it.

    Attributes:
        total: Elements in the checkpoint.
        parts: Parts of equal size.
        replicas: Ranks that hold the same part.

    """

    total: int
    parts: int
    replicas: int = 1

    @property
    def size(self) -> int:
        return self.total // self.parts

    def is_cut(self, block: int) -> bool:
        """Whether some part starts or ends inside a quant block."""
        return self.size % block != 0

    def shard(self, block: int, rank: int) -> BlockShard:
        return block_shard(self.total, block, rank // self.replicas, self.parts)


@dataclass(frozen=True)
class Layer:
    """A quantized layer of vLLM's, over all ranks.

    Attributes:
        name: vLLM's name, with ``*`` for the number of a decoder layer.
        kind: How vLLM shares it out. Experts stand for gate, up and down together.
        outputs: Rows of each logical shard (q, k, v; gate, up).
        inputs: Columns.
        experts: Number of routed experts, else 1.
        kv_heads: Of a ``qkv`` layer.
        is_fused: Whether the shards are one tensor in the checkpoint.
        scale_bytes: Of one scale.

    """

    name: str
    kind: Literal["experts", "qkv", "merged", "column", "row", "replicated"]
    outputs: tuple[int, ...]
    inputs: int
    experts: int = 1
    kv_heads: int = 0
    is_fused: bool = False
    scale_bytes: int = 4

    @property
    def heads(self) -> int:
        """Heads of q of a ``qkv`` layer, twice if they hold a gate of the output."""
        return self.outputs[0] // (self.outputs[1] // self.kv_heads)

    def dimensions(self, tp: int) -> tuple[Dimension, ...]:
        """Return those that ranks share: of each output, or of a row's input."""
        if self.kind == "row":
            return (Dimension(self.inputs, tp),)
        if self.kind == "experts":
            return (Dimension(self.outputs[0], tp),)
        if self.kind == "qkv":
            replicas = max(1, tp // self.kv_heads)
            kv = [Dimension(n, tp // replicas, replicas) for n in self.outputs[1:]]
            return (Dimension(self.outputs[0], tp), *kv)
        if self.kind == "replicated":
            return tuple(Dimension(n, 1, tp) for n in self.outputs)
        return tuple(Dimension(n, tp) for n in self.outputs)

    def undivided(self, tp: int) -> str | None:
        """Return what cannot be shared out evenly among ``tp`` ranks, or None."""
        if self.kind == "qkv" and max(self.kv_heads, tp) % min(self.kv_heads, tp):
            return f"{self.kv_heads} KV heads"
        # Some layers have more or fewer than config.json says of the model.
        if self.kind == "qkv" and self.heads % tp:
            return f"{self.heads} attention heads"
        for dimension in self.dimensions(tp):
            if dimension.total % dimension.parts:
                return f"{dimension.total} columns"
        return None

    def is_cut(self, tp: int, block: int) -> bool:
        """Whether the layer is cut inside a quant block, to this package."""
        *others, last = self.dimensions(tp)
        # As in vLLM, a partial block at the very end of a whole tensor is fine.
        return any(each.is_cut(block) for each in others) or (
            last.is_cut(block) and (last.parts > 1 or self.kind in ("experts", "row"))
        )


@dataclass
class Layers:
    """Quantized layers with how many there are of each, and what is not among them.

    Attributes:
        found: The layers.
        unknown: Quantized tensors of which nobody here knows how vLLM shares them.
        notes: What else was left out, for people.
        other_bytes: Bytes in the checkpoint that are not in blocks.

    """

    found: Counter[Layer] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    other_bytes: int = 0


@dataclass(frozen=True)
class Matrix:
    """A weight in quant blocks: its shape, and bytes of one of its scales."""

    shape: tuple[int, ...]
    scale_bytes: int


def layers(
    tensors: dict[str, Tensor], quantization: Quantization, fields: dict[str, Any]
) -> Layers:
    """Return the layers of a checkpoint's tensors.

    Args:
        tensors: All of its headers, or what its config.json implies.
        quantization: What the config says.
        fields: The language model's part of the config.

    Raises:
        UsageError: Weights and scales do not belong together.

    """
    result = Layers()
    kind = str(fields.get("model_type")).removesuffix("_text")
    if kind in PAD_THEMSELVES:
        result.unknown[f"vLLM's model of {kind} pads its own layers"] += 1
        return result
    parents, is_all = defaultdict(dict), True
    for name, matrix in _matrices(tensors, quantization, fields, result).items():
        if _is_left_out(name, fields):
            is_all = False
            continue
        parent, _, leaf = name.rpartition(".")
        parents[parent][leaf] = matrix
    if not is_all:
        result.notes.append("layers for multi-token prediction are left out")
    experts = defaultdict(dict)
    for parent, leaves in parents.items():
        if found := _EXPERT.fullmatch(parent):
            experts[found[1]][int(found[2])] = leaves
        elif all(len(matrix.shape) == 3 for matrix in leaves.values()):
            _add(result, _fused_experts(parent, leaves), parent)
        else:
            _add_linear(result, parent, leaves, fields)
    for parent, numbered in experts.items():
        _add(result, _experts(parent, numbered), f"{parent}.*")
    return result


def _is_left_out(name: str, fields: dict[str, Any]) -> bool:
    found, count = _LAYER.match(name), fields.get("num_hidden_layers")
    is_beyond = found and type(count) is int and int(found[1]) >= count
    return bool(is_beyond) or name.startswith("mtp.") or ".mtp." in name


def _matrices(
    tensors: dict[str, Tensor],
    quantization: Quantization,
    fields: dict[str, Any],
    result: Layers,
) -> dict[str, Matrix]:
    """Return modules in FP8 blocks; count all else."""
    matrices, scales, others = {}, set(), set()
    block = quantization.block and [*quantization.block]
    for name, tensor in tensors.items():
        # Scales of FP4 are FP8, too.
        is_scale = name.rpartition(".")[2] in SCALES
        if tensor.dtype != "F8_E4M3" or is_scale or len(tensor.shape) not in (2, 3):
            continue
        module = name.removesuffix(".weight")
        names = [f"{module}.{scale}" for scale in SCALES]
        # Experts that are fused in one parameter have no module of their own.
        names += [f"{name}_scale_inv", f"{name}_scale"]
        scale = next((each for each in names if each in tensors), None)
        if scale is None:
            raise UsageError(
                f"{name} in {tensor.file} is FP8 and has no scale such as {names[0]}. "
                "Download or quantize the checkpoint again."
            )
        kind = _scale_kind(name, tensor, scale, tensors[scale], quantization)
        if kind != "block":
            if block and quantization.is_uniform and not _is_left_out(name, fields):
                raise UsageError(
                    f"{scale} in {tensors[scale].file} is {kind}, but config.json's "
                    f"{quantization.format} has all layers in blocks of {block}, so "
                    "vLLM would not load it. Download or quantize it again."
                )
            others.add(kind)
            continue
        scales |= {name, scale}
        matrices[module] = Matrix(tensor.shape, tensors[scale].bytes_each)
    if others:
        kinds = " and ".join(sorted(others))
        result.notes.append(f"weights with scales {kinds} are left to stock")
    result.other_bytes = sum(t.bytes for n, t in tensors.items() if n not in scales)
    return matrices


def _scale_kind(
    name: str, weight: Tensor, scale: str, found: Tensor, quantization: Quantization
) -> str:
    shape, block = tuple(n for n in found.shape if n != 1), quantization.block
    rows = weight.shape[:-1]
    if block is not None and len(found.shape) > 1:
        blocks = [-(-n // b) for n, b in zip(weight.shape[-2:], block, strict=True)]
        whole = *weight.shape[:-2], *blocks
        if shape == tuple(n for n in whole if n != 1):
            return "block"
    if not shape:
        return "per tensor"
    if shape in (rows, rows[-1:], weight.shape[:1]):
        return "per channel or expert"
    raise UsageError(
        f"{scale} in {found.file} has shape {list(found.shape)}, but {name} of "
        f"{list(weight.shape)} in blocks of {block and list(block)} (by config.json's "
        f"{quantization.format}) needs another. Download or quantize it again."
    )


def _add(result: Layers, layer: Layer | None, name: str) -> None:
    if layer is None or max(*layer.outputs, layer.inputs) > MOST:
        result.unknown[_pattern(name)] += 1
    else:
        result.found[layer] += 1


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _fused_experts(parent: str, leaves: dict[str, Matrix]) -> Layer | None:
    """Return experts whose tensors are ``[experts, rows, columns]``."""
    roles = {EXPERT.get(leaf): matrix for leaf, matrix in leaves.items()}
    down = roles.get("down")
    if down is None:
        return None
    experts, hidden, size = down.shape
    shapes = {role: matrix.shape for role, matrix in roles.items() if role != "down"}
    both = {"both": (experts, 2 * size, hidden)}
    apart = dict.fromkeys(("gate", "up"), (experts, size, hidden))
    # Some models store them the other way round: those are not known.
    if shapes not in (both, apart):
        return None
    return _routed(parent, (size, size), hidden, experts, down)


def _experts(parent: str, numbered: dict[int, dict[str, Matrix]]) -> Layer | None:
    """Return experts whose tensors are one for each of them."""
    shapes = {tuple(sorted(leaves.items())) for leaves in numbered.values()}
    if len(shapes) > 1 or len(numbered) != max(numbered) + 1:
        raise UsageError(
            f"{parent} has experts of different tensors, or lacks some of its "
            f"{max(numbered) + 1}. Download the checkpoint again."
        )
    roles = {EXPERT.get(leaf): m for leaf, m in next(iter(numbered.values())).items()}
    down, up, gate = (roles.get(role) for role in ("down", "up", "gate"))
    if None in roles or down is None or up is None or down.shape != up.shape[::-1]:
        return None
    if gate is not None and gate.shape != up.shape:
        return None
    outputs = up.shape[:1] * (1 if gate is None else 2)
    return _routed(parent, outputs, up.shape[1], len(numbered), down)


def _routed(
    parent: str, outputs: tuple[int, ...], hidden: int, experts: int, down: Matrix
) -> Layer | None:
    if not all((*outputs, hidden, experts)):
        return None
    name, scale = _pattern(parent), down.scale_bytes
    return Layer(name, "experts", outputs, hidden, experts, scale_bytes=scale)


def _add_linear(
    result: Layers, parent: str, leaves: dict[str, Matrix], fields: dict[str, Any]
) -> None:
    """Add a module's linear layers; those that vLLM merges, as one."""
    left = dict(leaves)
    is_whole = parent.rpartition(".")[2] in WHOLE
    for name, groups in MERGED.items():
        for members in groups:
            if is_whole or not all(member in left for member in members):
                continue
            merged = [left.pop(member) for member in members]
            full = f"{parent}.{name}".lstrip(".")
            _add(result, _merged(full, merged, fields), full)
    for leaf, matrix in left.items():
        name = f"{parent}.{leaf}".lstrip(".")
        kind = "replicated" if is_whole else _kind(leaf, leaves, fields)
        if len(matrix.shape) != 2 or not all(matrix.shape):
            _add(result, None, name)
        elif kind is None:
            _add(result, _fused(name, leaf, matrix), name)
        else:
            rows, columns = matrix.shape
            scale = matrix.scale_bytes
            layer = Layer(_pattern(name), kind, (rows,), columns, scale_bytes=scale)
            _add(result, layer, name)


def _kind(leaf: str, siblings: dict[str, Matrix], fields: dict[str, Any]) -> Any:
    for kind, names in (("row", ROW), ("column", COLUMN), ("replicated", REPLICATED)):
        if leaf in names:
            return kind
    # Without a low rank, MLA's q is a layer of its own.
    is_mla = fields.get("kv_lora_rank") or "kv_a_proj_with_mqa" in siblings
    return "column" if leaf == "q_proj" and is_mla else None


def _merged(name: str, merged: list[Matrix], fields: dict[str, Any]) -> Layer | None:
    inputs, scale = merged[0].shape[-1], merged[0].scale_bytes
    outputs = tuple(matrix.shape[0] for matrix in merged)
    leaf = name.rpartition(".")[2]
    if any(len(m.shape) != 2 or m.shape[1] != inputs for m in merged):
        return None
    if not all((*outputs, inputs)):
        return None
    if leaf == "qkv_proj":
        return _qkv(name, outputs, inputs, fields, scale)
    if leaf == "in_proj_qkvz":
        # On disk q, k and v are one tensor, which vLLM takes apart again.
        keys = _key_rows(fields)
        values = outputs[1]
        if outputs[0] != 2 * keys + values or not keys:
            return None
        outputs = keys, keys, values, values
    kind = "replicated" if leaf == "fused_qkv_a_proj" else "merged"
    return Layer(_pattern(name), kind, outputs, inputs, scale_bytes=scale)


def _fused(name: str, leaf: str, matrix: Matrix) -> Layer | None:
    """Return a layer whose shards are one tensor in the checkpoint, too."""
    rows, inputs = matrix.shape
    # Of others, config.json does not say where the shards lie.
    if leaf != "gate_up_proj" or rows % 2:
        return None
    outputs, scale = (rows // 2, rows // 2), matrix.scale_bytes
    return Layer(
        *(_pattern(name), "merged", outputs, inputs), is_fused=True, scale_bytes=scale
    )


def _qkv(
    name: str,
    outputs: tuple[int, ...],
    inputs: int,
    fields: dict[str, Any],
    scale_bytes: int,
) -> Layer | None:
    head = _head_size(fields) if _LAYER.match(name) else 0
    if not head or outputs[0] % head or outputs[1] % head:
        return None
    kv_heads = outputs[1] // head
    if outputs[2] % kv_heads:
        return None
    return Layer(
        *(_pattern(name), "qkv", outputs, inputs),
        kv_heads=kv_heads,
        scale_bytes=scale_bytes,
    )


def _head_size(fields: dict[str, Any]) -> int:
    head, heads = fields.get("head_dim"), fields.get("num_attention_heads")
    hidden = fields.get("hidden_size")
    if type(head) is int and head > 0:
        return head
    if type(hidden) is not int or type(heads) is not int or heads <= 0:
        return 0
    return hidden // heads


def _key_rows(fields: dict[str, Any]) -> int:
    sizes = [fields.get(f"linear_{n}") for n in ("num_key_heads", "key_head_dim")]
    return sizes[0] * sizes[1] if all(type(n) is int for n in sizes) else 0
