# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of quantization: its format, blocks, and what is left out."""

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from vllm_patch.cli import UsageError
from vllm_patch.cli.block_format import FORMATS

# What checkpoints' patterns start with.
REGEX = "re:"
UNQUANTIZED = "unquantized"
INC = "inc", "auto-round", "auto_round"
MODELOPT, MIXED = ("modelopt", "modelopt_mixed"), "modelopt-mixed"
# ModelOpt's other name for FP8_PB_WO, which vLLM knows of experts.
EXPERTS_IN_BLOCKS = ("FP8_BLOCK_SCALES",)
IN_BLOCKS = "FP8_PB_WO", *EXPERTS_IN_BLOCKS
# Fields of Quark and INC with schemes of single layers.
OVERRIDES = "layer_quant_config", "layer_type_quant_config", "extra_config"
# vLLM's layers that are several in a checkpoint, each in ModelOpt's list or not.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
SCHEMES = "static", "dynamic"
# Names of experts or their parts; of single ones, or patterns of those.
_EXPERTS = re.compile(r"experts\b")
_SINGLE = re.compile(r"\bexperts\\?\.[\d\\\[(]")
LEAST_BLOCK, MOST_BLOCK = 8, 1 << 20


@dataclass(frozen=True)
class Modules:
    """Modules by names, parts of names between dots, and patterns."""

    names: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern, ...] = ()

    @classmethod
    def of(cls, listed: Any) -> "Modules":
        """Read a list of a config; raise ValueError if a pattern is none."""
        texts = [text for text in listed or () if isinstance(text, str)]
        patterns = []
        for text in texts:
            if text.startswith(REGEX):
                patterns.append(_compiled(text.removeprefix(REGEX)))
            elif "*" in text:
                patterns.append(re.compile(fnmatch.translate(text)))
        return cls(frozenset(texts), tuple(patterns))

    def has(self, module: str) -> bool:
        return any(name in self.names for name in parts(module)) or any(
            pattern.match(module) for pattern in self.patterns
        )


def parts(module: str) -> Iterator[str]:
    """Return the parts of a module's name between any two dots."""
    words = module.split(".")
    ends = combinations(range(len(words) + 1), 2)
    return (".".join(words[i:j]) for i, j in ends)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {pattern[:80]!r}: {error}") from error


@dataclass(frozen=True)
class Quantization:
    """How weights are quantized.

    Attributes:
        format: Its name in the patch table, or what the config calls it.
        block: Rows and columns of a quant block; None if weights are not FP8 in blocks.
        unquantized: Modules that are left in 16 bits.
        listed: With a mixed format, the algorithms of layers by name; else None.
        is_uniform: Whether what is FP8 is in blocks, without exception.
        untold: Why headers alone tell which modules are in blocks; empty if the config
            does, too.

    """

    format: str
    block: tuple[int, int] | None
    unquantized: Modules = Modules()
    listed: dict[str, str] | None = None
    is_uniform: bool = True
    untold: tuple[str, ...] = ()

    def takes(self, module: str) -> bool:
        """Whether a module's weights are in blocks, by the config alone."""
        if self.block is None or self.unquantized.has(module):
            return False
        if self.listed is None:
            return True
        return _algorithm(self.listed, module) in IN_BLOCKS


def _algorithm(listed: dict[str, str], module: str) -> str | None:
    """Return the algorithm of a checkpoint's module, as vLLM looks its layer up."""
    parent, is_expert, _ = module.partition(".experts.")
    if is_expert:
        # The first child speaks for experts without a word, then the first sibling.
        experts = f"{parent}.experts"
        starts = f"{experts}.", f"{parent}."
        children = (n for start in starts for n in listed if n.startswith(start))
        return listed.get(experts) or listed.get(next(children, ""))
    parent, _, leaf = module.rpartition(".")
    for fused, shards in FUSED.items():
        if leaf in shards:
            names = [f"{parent}.{shard}" for shard in shards]
            said = {listed[name] for name in names if name in listed}
            if whole := listed.get(f"{parent}.{fused}"):
                return whole
            if len(said) == 1:
                return said.pop()
    return listed.get(module)


def read(fields: dict[str, Any], source: str) -> Quantization:
    """Return what a config.json says.

    Raises:
        UsageError: It makes no sense, or vLLM does not take it.

    """
    text = fields.get("text_config")
    found = fields.get("quantization_config") or fields.get("compression_config")
    if not found and isinstance(text, dict):
        found = text.get("quantization_config")
    if not found:
        return Quantization(UNQUANTIZED, None)
    try:
        return _read(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{source}: its quantization_config makes no sense ({error!r}). Compare it "
            "with the published one."
        ) from error


def _read(found: dict[str, Any]) -> Quantization:
    method = str(found.get("quant_method")).lower().replace("_tensors", "-tensors")
    if method in INC:
        is_fp8 = (found.get("bits"), found.get("data_type")) == (8, "fp")
        group = found.get("group_size")
        block = group if is_fp8 and isinstance(group, list) else None
        untold = _own_schemes(found)
        return Quantization(
            "inc", _block(block), is_uniform=not untold, untold=tuple(untold)
        )
    if method in MODELOPT or _is_modelopt(found):
        return _modelopt(found)
    known = FORMATS.get(method)
    if known is None:
        return Quantization(method, None)
    block = _block(known.blocks(found))
    left_out, schemes = found.get(known.unquantized), _own_schemes(found)
    if method == "fp8":
        _check_activation_scheme(found, block)
        left_out = found.get("ignored_layers") or left_out
    return Quantization(
        *(method, block, Modules.of(left_out)),
        is_uniform=not schemes,
        untold=(*schemes, *_single_experts(left_out)),
    )


def _check_activation_scheme(found: dict[str, Any], block: Any) -> None:
    if "activation_scheme" not in found:
        raise ValueError("no activation_scheme, without which vLLM does not start")
    scheme = found["activation_scheme"]
    if scheme not in SCHEMES:
        raise ValueError(f"activation_scheme {scheme!r}: vLLM takes {SCHEMES}")
    if block and scheme != "dynamic":
        raise ValueError(
            f"activation_scheme {scheme!r}: with blocks vLLM takes 'dynamic' alone"
        )


def _own_schemes(found: dict[str, Any]) -> list[str]:
    """Return what gives schemes to layers by the names of a model's own modules."""
    reasons = [f"layers of {key}" for key in OVERRIDES if found.get(key)]
    groups = [*(found.get("config_groups") or {}).values()]
    if len(groups) > 1 or any(g.get("targets") != ["Linear"] for g in groups):
        reasons.append("layers of config_groups for other targets than Linear")
    return reasons


def _single_experts(left_out: Any) -> tuple[str, ...]:
    """Return what leaves out some of the experts, which vLLM builds as one."""
    names = [text for text in left_out or () if isinstance(text, str)]
    single = next(filter(_SINGLE.search, names), None)
    return (f"experts, of which {single[:80]} is left out",) if single else ()


def _is_modelopt(found: dict[str, Any]) -> bool:
    """Whether ModelOpt wrote it in its own way, which names no quant_method."""
    inner, producer = found.get("quantization"), found.get("producer")
    is_named = isinstance(producer, dict) and producer.get("name") == "modelopt"
    return isinstance(inner, dict) and (is_named or "modelopt_quant_config" in inner)


def _modelopt(found: dict[str, Any]) -> Quantization:
    if "quantization" in found:
        found = found["quantization"]
        left_out = found.get("exclude_modules")
    else:
        left_out = found.get("ignore", found.get("exclude_modules"))
    algorithm = str(found.get("quant_algo")).upper()
    unquantized, untold = Modules.of(left_out), _single_experts(left_out)
    if algorithm == "MIXED_PRECISION":
        return _mixed(found["quantized_layers"], unquantized, untold)
    if algorithm in EXPERTS_IN_BLOCKS:
        raise ValueError(
            f"quant_algo {algorithm}: vLLM takes it of experts in MIXED_PRECISION alone"
        )
    block = FORMATS["modelopt"].blocks({"quant_algo": algorithm})
    return Quantization("modelopt", _block(block), unquantized, untold=untold)


def _mixed(
    layers: dict[str, Any], unquantized: Modules, untold: tuple[str, ...]
) -> Quantization:
    """Return what a list of layers says, each with an algorithm of its own."""
    listed = {n: str(layer.get("quant_algo")).upper() for n, layer in layers.items()}
    in_blocks = [name for name, algorithm in listed.items() if algorithm in IN_BLOCKS]
    for name in in_blocks:
        if listed[name] in EXPERTS_IN_BLOCKS and not _EXPERTS.search(name):
            raise ValueError(f"{name}: vLLM takes {listed[name]} of experts alone")
        if (size := layers[name].get("group_size", 128)) != 128:
            raise ValueError(f"{name}: blocks of {size}, not 128")
    block = (128, 128) if in_blocks else None
    return Quantization(MIXED, block, unquantized, listed, False, untold)


def _block(block: Any) -> tuple[int, int] | None:
    if not block:
        return None
    rows, columns = block
    for size in (rows, columns):
        if type(size) is not int or not LEAST_BLOCK <= size <= MOST_BLOCK:
            raise ValueError(f"quant blocks of {str(block)[:80]}")
    return rows, columns
