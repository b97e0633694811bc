"""LoRA adapters of a Qwen3 model, and what stock needs to compute a cut rank's part."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.quantized import BLOCK, Part
from vllm_patch.cli.model_config import ModelConfig

LORA_RANK = 8
ADAPTERS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "experts": ["gate_proj", "up_proj", "down_proj"],
}
PREFIX = "base_model.model."


def write_adapters(folder: Path) -> None:
    """Write random adapters for a checkpoint's layers to folders below it.

    Their products are as large as those of the layers.
    """
    shapes = {n: t.shape for n, t in load_file(folder / "model.safetensors").items()}
    for name, targets in ADAPTERS.items():
        generator = torch.Generator().manual_seed(len(name))
        tensors = {}
        for weight, (rows, columns) in _weights(shapes, targets):
            module = PREFIX + weight.removesuffix(".weight")
            a = torch.randn(LORA_RANK, columns, generator=generator) / columns**0.5
            b = torch.randn(rows, LORA_RANK, generator=generator) / LORA_RANK**0.5
            tensors[f"{module}.lora_A.weight"] = a.bfloat16()
            tensors[f"{module}.lora_B.weight"] = b.bfloat16()
        _write_adapter(folder / name, tensors, targets)


def write_stock(
    config: ModelConfig, cut: Path, folder: Path, rank: int, tp_size: int
) -> None:
    """Write a checkpoint whose whole blocks are those of a rank of a cut one.

    Stock's rank gets the same bytes as the cut one's: zeros around its columns. There
    is one adapter more, ``tail``: that of experts, with all zeros at the end.
    """
    part = Part.of(config.text["moe_intermediate_size"], rank, tp_size)
    folder.mkdir()
    fields = json.loads((cut / "config.json").read_text())
    fields["moe_intermediate_size"] = tp_size * part.span
    (folder / "config.json").write_text(json.dumps(fields))
    wide = {
        name: _wide(name, tensor, part, rank, tp_size, part.lead)
        for name, tensor in load_file(cut / "model.safetensors").items()
    }
    save_file(wide, folder / "model.safetensors")
    for name, source, lead in (
        *((name, name, part.lead) for name in ADAPTERS),
        ("tail", "experts", 0),
    ):
        tensors = load_file(cut / source / "adapter_model.safetensors")
        wide = {n: _wide(n, t, part, rank, tp_size, lead) for n, t in tensors.items()}
        _write_adapter(folder / name, wide, ADAPTERS[source])


def _weights(shapes: dict, targets: Iterable[str]):
    ends = tuple(f"{target}.weight" for target in targets)
    return [(n, shape) for n, shape in shapes.items() if n.endswith(ends)]


def _write_adapter(folder: Path, tensors: dict, targets: Iterable[str]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_RANK}
    config |= {"target_modules": [*targets], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _wide(
    name: str, tensor: torch.Tensor, part: Part, rank: int, tp_size: int, lead: int
) -> torch.Tensor:
    """Return a tensor of experts in stock's size; others as they are."""
    if ".experts." not in name:
        return tensor
    is_down, is_a, is_b = (n in name for n in ("down_proj", ".lora_A.", ".lora_B."))
    if (is_a and not is_down) or (is_b and is_down):
        return tensor
    dim = 1 if is_down else 0
    start, size, offset, span = part.start, part.size, lead, part.span
    fill = 0.0
    if name.endswith("weight_scale_inv"):
        start, offset, span = start // BLOCK, 0, span // BLOCK
        size, fill = span, 1.0
    shape = [tp_size * span if d == dim else n for d, n in enumerate(tensor.shape)]
    wide = torch.full(shape, fill).to(tensor.dtype)
    wide.narrow(dim, rank * span + offset, size).copy_(tensor.narrow(dim, start, size))
    return wide
