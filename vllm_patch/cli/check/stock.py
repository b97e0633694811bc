# SPDX-License-Identifier: Apache-2.0
"""What each release of vLLM does with a quantized layer, as its sources have it.

The one place for what ``vllm-patch check`` knows of vLLM: which release refuses,
refines or pads what, and in which words. Errors are vLLM's own texts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from packaging.version import Version

from vllm_patch.cli.check.layers import Dimension, Layer
from vllm_patch.patch_table import PATCHES

# The first releases in which `Fp8MoEMethod` makes smaller blocks of those that are cut,
# for Triton's kernels, and in which other backends that are asked for get whole ones.
REFINES, SHARES_BLOCKS = "0.29.0", "0.31.0"
# And experts of one projection instead of gate and up.
UNGATED = "0.28.0"
SMALLEST_REFINED = 32
# And whose kernels for CPUs take experts of groups that are scored by sigmoids.
GROUPS_ON_CPU = "0.30.0"
AUTO, TRITON, DEEP_GEMM = BACKENDS = "auto", "triton", "deep_gemm"
HOPPER, CPU = PLATFORMS = "hopper", "cpu"
# Rows and columns of the blocks that all kernels but Triton's take, and what
# config.json calls SiLU.
BLOCK, SILU = 128, (None, "silu", "swiglu")


@dataclass(frozen=True)
class Facts:
    """What differs between the formats of checkpoints.

    Attributes:
        refines: Experts are those of plain FP8, which later releases refine.
        validates: Which column-parallel layers are looked at before they are loaded:
            all, those with one output, or none.

    """

    refines: bool
    validates: Literal["all", "single", "none"]


FORMATS = {
    "fp8": Facts(True, "single"),
    "compressed-tensors": Facts(False, "all"),
    "quark": Facts(False, "all"),
    "modelopt": Facts(False, "none"),
    "modelopt-mixed": Facts(True, "none"),
    "inc": Facts(False, "all"),
}


# Formats of which vLLM has linear layers in blocks, and no experts.
LINEAR_ONLY = "modelopt", "inc"
# Formats by the name of their row in the patch table, where that is another.
ROWS = {"fp8": "layers"}


def since(checkpoint_format: str) -> str:
    """Return the first release of which it is known here how it reads a format."""
    name = ROWS.get(checkpoint_format, checkpoint_format)
    return next(patch.since for patch in PATCHES if patch.name == name)


@dataclass(frozen=True)
class Setting:
    """Where a model is to run.

    Attributes:
        release: Of vLLM.
        tp: Tensor-parallel size.
        platform: One of ``PLATFORMS``.
        backend: ``--moe-backend``, one of ``BACKENDS``.
        format: The checkpoint's, a key of ``FORMATS``.
        block: Rows and columns of a quant block.
        is_built_in: Whether that vLLM pads in its own source, so as it is.

    """

    release: str
    tp: int
    platform: str
    backend: str
    format: str
    block: tuple[int, int]
    is_built_in: bool = False

    def since(self, release: str) -> bool:
        return Version(self.release) >= Version(release)


@dataclass(frozen=True)
class Answer:
    """What becomes of a layer.

    Attributes:
        kind: ``fine``, ``refined`` (to smaller blocks), ``shared`` (in whole blocks, of
            which the last ranks may get none), ``wrong`` (loads, with scales of other
            blocks), ``error``, or ``unknown``.
        text: The error, or what is to be said of it.
        block: The refined block, else the checkpoint's rows.

    """

    kind: Literal["fine", "refined", "shared", "wrong", "error", "unknown"]
    text: str = ""
    block: int = 0

    @property
    def runs(self) -> bool:
        return self.kind in ("fine", "refined", "shared")


FINE = Answer("fine")


def activation_of(text: dict[str, Any]) -> str | None:
    """Return what experts compute, by the model's config.json; None if it says not."""
    names = "hidden_act", "hidden_activation", "mlp_hidden_act"
    return next((text[name] for name in names if text.get(name)), None)


def computes_silu(layer: Layer, text: dict[str, Any]) -> bool:
    """Return whether experts compute SiLU and gate."""
    return activation_of(text) in SILU and len(layer.outputs) == 2


def unserved(layer: Layer, setting: Setting, text: dict[str, Any]) -> str | None:
    """Return why the kernels that are asked for take no such layer, or None."""
    is_whole = setting.block == (BLOCK, BLOCK)
    if setting.platform == CPU and not is_whole:
        return f"kernels for CPUs are known to take blocks of {BLOCK}x{BLOCK} only"
    is_early = setting.platform == CPU and not setting.since(GROUPS_ON_CPU)
    if layer.kind == "experts" and is_early and _scores_groups(text):
        return f"kernels for CPUs take experts of groups from vLLM {GROUPS_ON_CPU} on"
    if layer.kind != "experts" or setting.backend != DEEP_GEMM:
        return None
    if not is_whole:
        return f"DeepGEMM takes blocks of {BLOCK}x{BLOCK} only"
    if not computes_silu(layer, text):
        return "DeepGEMM is known to compute experts with SiLU and gate only"
    return None


def _scores_groups(text: dict[str, Any]) -> bool:
    """Whether experts are routed as DeepSeek-V3's; GLM's config says no function."""
    return bool(text.get("n_group")) and text.get("scoring_func") in (None, "sigmoid")


def answer(layer: Layer, setting: Setting, text: dict[str, Any]) -> Answer:
    """Return what stock vLLM does with a layer.

    Args:
        layer: One of the model.
        setting: Where it runs.
        text: The language model's fields of config.json.

    """
    if undivided := layer.undivided(setting.tp):
        return Answer("error", f"{undivided} are not divisible by TP {setting.tp}")
    if not setting.since(first := since(setting.format)):
        known = f"{setting.format} in FP8 blocks is known from vLLM {first} on"
        return Answer("unknown", known)
    if why := unserved(layer, setting, text):
        return Answer("error", why)
    if layer.kind == "experts":
        return _experts(layer, setting)
    if layer.kind == "row":
        return _row(layer, setting)
    return _early(layer, setting) or _loaded(layer, setting)


def _experts(layer: Layer, setting: Setting) -> Answer:
    (dimension,), (block_n, block_k) = layer.dimensions(setting.tp), setting.block
    size, tp = dimension.size, setting.tp
    if setting.format in LINEAR_ONLY:
        none = f"vLLM has no experts of {setting.format} in FP8 blocks"
        return Answer("error", none)
    if size % block_n == 0 and (tp == 1 or size % block_k == 0):
        return FINE
    refined = math.gcd(block_n, block_k, size, layer.inputs)
    if not FORMATS[setting.format].refines or not setting.since(REFINES):
        return _asserted(size, setting.block)
    can_refine = refined >= SMALLEST_REFINED
    is_asked_for = setting.backend != AUTO and setting.since(SHARES_BLOCKS)
    is_square = block_n == block_k and tp > 1 and size % block_n
    if is_asked_for and is_square and not (can_refine and setting.backend == TRITON):
        return _shared(layer, setting)
    if not can_refine:
        return _asserted(size, setting.block)
    if setting.platform == CPU:
        return Answer("error", "Unsupported FP8 MoE backend: NONE")
    if setting.backend not in (AUTO, TRITON):
        return Answer("error", "does not support the deployment configuration")
    return Answer("refined", f"refined to {refined}x{refined}, Triton only", refined)


def _asserted(size: int, block: tuple[int, int]) -> Answer:
    parts = "The output_size of gate's and up's", "block_n", block[0]
    if size % block[0] == 0:
        parts = "The input_size of down's", "block_k", block[1]
    what, name, by = parts
    rule = f"is not divisible by weight quantization {name} = {by}."
    return Answer("error", f"{what} weight = {size} {rule}")


def _shared(layer: Layer, setting: Setting) -> Answer:
    block, tp = setting.block[0], setting.tp
    total = layer.outputs[0]
    if total % block or layer.inputs % block:
        return Answer(
            "error",
            f"Block-aligned FP8 TP sharding requires {block}-aligned global expert "
            "dimensions, pure TP, and no LoRA or expert bias.",
        )
    span = -(-(total // tp) // block) * block
    idle = tp - -(-total // span)
    return Answer("shared", f"whole blocks, {idle} of {tp} ranks idle", span)


def _row(layer: Layer, setting: Setting) -> Answer:
    (dimension,), block_k = layer.dimensions(setting.tp), setting.block[1]
    if setting.format in ("modelopt", "modelopt-mixed"):
        if dimension.size % 128:
            text = f"FP8_PB_WO requires in divisible by 128, got {dimension.size}"
            return Answer("error", text)
    elif setting.tp > 1 and dimension.size % block_k:
        return Answer(
            "error",
            f"Weight input_size_per_partition = {dimension.size} is not divisible by "
            f"weight quantization block_k = {block_k}.",
        )
    return FINE


def _early(layer: Layer, setting: Setting) -> Answer | None:
    """Return the error of vLLM's own look at the sizes, or None."""
    dimensions, block_n = layer.dimensions(setting.tp), setting.block[0]
    looks = FORMATS[setting.format].validates
    # It expects merged layers of plain FP8 to have partial blocks, and lets them pass.
    if looks == "none" or (looks == "single" and len(dimensions) > 1):
        return None
    is_split = setting.tp > 1 and layer.kind != "replicated"
    checked = dimensions if is_split else dimensions[:-1]
    for dimension in checked:
        if dimension.is_cut(block_n):
            return Answer(
                "error",
                f"Weight output_partition_size = {dimension.size} is not divisible by "
                f"weight quantization block_n = {block_n}.",
            )
    return None


def _loaded(layer: Layer, setting: Setting) -> Answer:
    """Follow vLLM's loader, which counts rows of scales, through all ranks."""
    dimensions, block = layer.dimensions(setting.tp), setting.block[0]
    if not any(dimension.is_cut(block) for dimension in dimensions):
        return FINE
    is_right = True
    for rank in range(setting.tp):
        right = rank_scales(dimensions, block, rank)
        if isinstance(right, str):
            return Answer("error", right)
        is_right &= right
    if is_right:
        return FINE
    return Answer("wrong", "loads scales of other blocks, without an error")


def rank_scales(dimensions: tuple[Dimension, ...], block: int, rank: int) -> bool | str:
    """Return whether a rank's outputs get their scales, or the error."""
    rows = -(-sum(dimension.size for dimension in dimensions) // block)
    held: list[tuple[int, int] | None] = [None] * rows
    offset = 0
    for index, dimension in enumerate(dimensions):
        count = rows if len(dimensions) == 1 else -(-dimension.size // block)
        row, source = -(-offset // block), rank // dimension.replicas * count
        for start, length in ((row, rows), (source, -(-dimension.total // block))):
            if error := _out_of_range(start, count, length):
                return error
        held[row : row + count] = [(index, source + i) for i in range(count)]
        offset += dimension.size
    return all(held[row] == owner for row, owner in _owners(dimensions, block, rank))


def _out_of_range(start: int, count: int, length: int) -> str | None:
    """Return what torch says of such a slice of a dimension."""
    if start > length:
        rule = f"expected to be in range of [-{length}, {length}], but got {start}"
        return f"start out of range ({rule})"
    if start + count > length:
        return f"start ({start}) + length ({count}) exceeds dimension size ({length})."
    return None


def _owners(
    dimensions: tuple[Dimension, ...], block: int, rank: int
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield each row of a rank's scales with shard and block that it should be of."""
    offset = 0
    for index, dimension in enumerate(dimensions):
        start, size = rank // dimension.replicas * dimension.size, dimension.size
        # Wherever a block begins, in the rank's weight or in the checkpoint's.
        begins = {0, *range(-offset % block, size, block)}
        for j in sorted(begins | {*range(-start % block, size, block)}):
            yield (offset + j) // block, (index, (start + j) // block)
        offset += size
