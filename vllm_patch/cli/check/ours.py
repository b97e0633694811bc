# SPDX-License-Identifier: Apache-2.0
"""What this package does with a layer that is cut inside a quant block."""

from dataclasses import dataclass
from typing import Any, Literal

from vllm_patch.cli import environment
from vllm_patch.cli.check.layers import Layer
from vllm_patch.cli.check.stock import (
    AUTO,
    BLOCK,
    CPU,
    LINEAR_ONLY,
    SILU,
    TRITON,
    UNGATED,
    Setting,
    activation_of,
    since,
    unserved,
)
from vllm_patch.wrappers import MODES, OFF, VARIABLE

# Blocks that masked kernels hold of one rank, and what they compute of gate and up, or
# of one projection, as config.json calls it.
MOST_BLOCKS = 4
MASKED = {2: (*SILU, "gelu_pytorch_tanh", "swigluoai"), 1: (None, "relu2")}


@dataclass(frozen=True)
class Ours:
    """What becomes of a layer with this package.

    Attributes:
        kind: ``stock`` (not cut: nothing changes), ``compact``, ``padded``, or ``left``
            (cut, and left to stock vLLM).
        why: Why it is not compact, or is left.

    """

    kind: Literal["stock", "compact", "padded", "left"]
    why: str = ""


def ours(layer: Layer, setting: Setting, text: dict[str, Any]) -> Ours:
    """Return what this package does with a layer.

    Args:
        layer: One that ``setting.tp`` ranks can share.
        setting: Where it runs.
        text: The language model's fields of config.json.

    """
    if not any(layer.is_cut(setting.tp, block) for block in setting.block):
        return Ours("stock")
    if obstacle := _obstacle(layer, setting, text):
        return Ours("left", obstacle)
    if layer.kind != "experts":
        return Ours("padded")
    reason = _why_padded(layer, setting, text)
    return Ours("padded", reason) if reason else Ours("compact")


def _obstacle(layer: Layer, setting: Setting, text: dict[str, Any]) -> str | None:
    name, block = setting.format, setting.block[0]
    is_experts = layer.kind == "experts"
    if environment.mode() == OFF:
        return f"{VARIABLE}={OFF}"
    if setting.block[0] != setting.block[1]:
        return "the blocks are not square"
    if setting.is_built_in and name != "fp8":
        return "what is built into this vLLM pads plain fp8 only"
    if not setting.since(since(name)):
        return f"{name} in FP8 blocks is taken from vLLM {since(name)}"
    if name not in ("fp8", "inc") and block != BLOCK:
        return f"vLLM has no kernels for {name} in blocks of {block}"
    if is_experts and name in LINEAR_ONLY:
        return f"vLLM has no experts of {name} in FP8 blocks"
    if is_experts and layer.inputs % block:
        return f"hidden size {layer.inputs} is not a multiple of {block} either"
    if is_experts and len(layer.outputs) == 1 and not setting.since(UNGATED):
        return "this release has no block-FP8 experts without a gate projection"
    if why := unserved(layer, setting, text):
        return why
    if layer.is_fused and layer.outputs[0] % block:
        return f"shards that are fused on disk meet inside a quant block of {block}"
    return None


def _why_padded(layer: Layer, setting: Setting, text: dict[str, Any]) -> str | None:
    """Return why experts are not stored compact, or None."""
    (dimension,), block = layer.dimensions(setting.tp), setting.block[0]
    blocks = max(dimension.shard(block, r).num_blocks for r in range(setting.tp))
    if (mode := environment.mode()) != MODES[0]:
        return f"{VARIABLE}={mode}"
    if setting.platform == CPU:
        return "kernels for CPUs take whole blocks"
    if setting.backend not in (AUTO, TRITON):
        return f"kernels of {setting.backend} take whole blocks"
    if block != BLOCK:
        return f"masked kernels take blocks of {BLOCK}, not {block}"
    if (activation := activation_of(text)) not in MASKED[len(layer.outputs)]:
        return f"masked kernels do not compute {activation}"
    if blocks > MOST_BLOCKS:
        return f"masked kernels take up to {MOST_BLOCKS} blocks a rank, not {blocks}"
    return None
