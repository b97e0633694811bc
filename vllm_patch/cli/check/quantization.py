# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of quantization: its format, blocks, and what is left out."""

import fnmatch
import re
from dataclasses import dataclass
from typing import Any

from vllm_patch.cli import UsageError
from vllm_patch.cli.block_format import FORMATS

# Some checkpoints write patterns of either kind, for vLLM's module or the tensor's.
REGEX = "re:"
INC = "inc", "auto-round", "auto_round"
MIXED = "modelopt-mixed"
MOST_BLOCK = 1 << 20


@dataclass(frozen=True)
class Quantization:
    """How weights are quantized.

    Attributes:
        format: Its name in the patch table, or what the config calls it.
        block: Rows and columns of a quant block; None if weights are not FP8 in blocks.
        unquantized: Names and patterns of modules that are left in 16 bits.
        listed: With a mixed format, the only modules in blocks; else None.

    """

    format: str
    block: tuple[int, int] | None
    unquantized: tuple[str, ...] = ()
    listed: tuple[str, ...] | None = None

    def takes(self, module: str) -> bool:
        """Whether a module's weights are in blocks, by the config alone."""
        if self.block is None or any(_is(module, name) for name in self.unquantized):
            return False
        return self.listed is None or any(_is(module, name) for name in self.listed)


def _is(module: str, name: str) -> bool:
    if name.startswith(REGEX):
        try:
            return re.match(name.removeprefix(REGEX), module) is not None
        except re.error:
            return False
    if "*" in name:
        return fnmatch.fnmatchcase(module, name)
    return f".{name}." in f".{module}."


def read(fields: dict[str, Any], source: str) -> Quantization:
    """Return what a config.json says; raise UsageError if it makes no sense."""
    text = fields.get("text_config")
    found = fields.get("quantization_config") or fields.get("compression_config")
    if not found and isinstance(text, dict):
        found = text.get("quantization_config")
    if not found:
        return Quantization("unquantized", None)
    try:
        return _read(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{source}: its quantization_config makes no sense ({error!r}). Compare it "
            "with the published one."
        ) from error


def _read(found: dict[str, Any]) -> Quantization:
    method = str(found.get("quant_method")).lower()
    if method in INC:
        is_fp8 = (found.get("bits"), found.get("data_type")) == (8, "fp")
        group = found.get("group_size")
        block = group if is_fp8 and isinstance(group, list) else None
        return Quantization("inc", _block(block))
    known = FORMATS.get(method)
    if known is None:
        return Quantization(method, None)
    unquantized = _names(found.get(known.unquantized))
    listed = found.get("quantized_layers")
    if method == "modelopt" and listed:
        names = [
            name
            for name, layer in listed.items()
            if layer.get("quant_algo") == "FP8_PB_WO"
        ]
        block = [128, 128] if names else None
        return Quantization(MIXED, _block(block), unquantized, tuple(names))
    return Quantization(method, _block(known.blocks(found)), unquantized)


def _block(block: Any) -> tuple[int, int] | None:
    if not block:
        return None
    rows, columns = block
    for size in (rows, columns):
        if type(size) is not int or not 0 < size <= MOST_BLOCK:
            raise ValueError(f"quant blocks of {str(block)[:80]}")
    return rows, columns


def _names(found: Any) -> tuple[str, ...]:
    return tuple(name for name in found or () if isinstance(name, str))
