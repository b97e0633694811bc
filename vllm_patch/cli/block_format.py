# SPDX-License-Identifier: Apache-2.0
"""How checkpoints of each format say that their weights are FP8 in quant blocks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BlockFormat:
    """What a quantization_config of config.json says.

    Attributes:
        blocks: Takes the quantization_config; returns rows and columns of a quant
            block, or None if weights are not FP8 in blocks.
        unquantized: Its field with the modules that are left in bfloat16.
        scale: What a module's block scales are called.
        scale_dims: Dimensions of the scales; those beyond two are 1.
        config: vLLM's name of its config, if not the ``quant_method``.

    """

    blocks: Callable[[dict[str, Any]], list[int] | None]
    unquantized: str
    scale: str = "weight_scale"
    scale_dims: int = 2
    config: str = ""

    def stored(self, scale: "torch.Tensor") -> "torch.Tensor":
        """Return scales ``[row blocks, column blocks]`` as the format stores them."""
        return scale[:, None, :, None] if self.scale_dims == 4 else scale

    def leaves(self, module: str, quantization: dict[str, Any]) -> bool:
        """Whether a module is left in bfloat16."""
        return _is_in(module, quantization.get(self.unquantized) or [])

    def leaving(
        self, modules: list[str], quantization: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the quantization_config of a checkpoint that leaves these, too."""
        names = {*(quantization.get(self.unquantized) or []), *modules}
        return {**quantization, self.unquantized: sorted(names)}


class _AutoRound(BlockFormat):
    """Names modules with the bits that they have."""

    def leaves(self, module, quantization):
        bits = quantization.get(self.unquantized) or {}
        return _is_in(module, [n for n, how in bits.items() if how["bits"] == 16])

    def leaving(self, modules, quantization):
        left = dict.fromkeys(sorted(modules), {"bits": 16})
        bits = {**(quantization.get(self.unquantized) or {}), **left}
        return {**quantization, self.unquantized: bits}


class _Mixed(BlockFormat):
    """Names the modules that are quantized."""

    def leaves(self, module, quantization):
        return not _is_in(module, quantization["quantized_layers"])

    def leaving(self, modules, quantization):
        return quantization


def _is_in(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def _compressed_tensors(quantization: dict[str, Any]) -> list[int] | None:
    groups = quantization.get("config_groups", {}).values()
    weights = [group.get("weights") or {} for group in groups]
    fp8 = [w for w in weights if (w.get("type"), w.get("num_bits")) == ("float", 8)]
    return next((w["block_structure"] for w in fp8 if w.get("block_structure")), None)


def _quark(quantization: dict[str, Any]) -> list[int] | None:
    weight = quantization.get("global_quant_config", {}).get("weight") or {}
    return weight.get("block_size") if weight.get("dtype") == "fp8_e4m3" else None


def _modelopt(quantization: dict[str, Any]) -> list[int] | None:
    return [128, 128] if quantization.get("quant_algo") == "FP8_PB_WO" else None


def _modelopt_mixed(quantization: dict[str, Any]) -> list[int] | None:
    """Of experts alone; scales of linear layers have another name."""
    layers = quantization.get("quantized_layers") or {"": {}}
    in_blocks = (
        name.endswith(".experts") and _modelopt(how) for name, how in layers.items()
    )
    return [128, 128] if all(in_blocks) else None


def _auto_round(quantization: dict[str, Any]) -> list[int] | None:
    is_fp8 = (quantization.get("data_type"), quantization.get("bits")) == ("fp", 8)
    size = quantization.get("group_size")
    return size if is_fp8 and isinstance(size, list) else None


FORMATS = {
    "fp8": BlockFormat(
        lambda quantization: quantization.get("weight_block_size"),
        unquantized="modules_to_not_convert",
        scale="weight_scale_inv",
    ),
    "compressed-tensors": BlockFormat(_compressed_tensors, unquantized="ignore"),
    "quark": BlockFormat(_quark, unquantized="exclude"),
    "modelopt": BlockFormat(_modelopt, unquantized="ignore", scale_dims=4),
    "modelopt, mixed": _Mixed(
        _modelopt_mixed, "ignore", scale="weight_scale_inv", config="modelopt_mixed"
    ),
    "auto-round": _AutoRound(
        _auto_round, "extra_config", scale="weight_scale_inv", config="inc"
    ),
}


def format_of(quantization: dict[str, Any]) -> BlockFormat | None:
    """Return the format of a quantization_config, or None if none has its name."""
    name = quantization.get("quant_method")
    is_mixed = quantization.get("quant_algo") == "MIXED_PRECISION"
    return FORMATS.get(f"{name}, mixed" if is_mixed else name)
