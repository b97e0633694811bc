# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tile sizes of the masked kernels: tuned files, and a rule for the rest."""

import functools
import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name
from vllm.platforms import current_platform

from .shard import BlockShard

logger = init_logger("vllm.fp8_tp_padding")

BLOCK = 128
CONFIGS = Path(__file__).parent / "configs"


def _check_positive(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} = {value!r} is not a positive integer.")


def _check_power_of_two(name: str, value: int, least: int) -> None:
    _check_positive(name, value)
    if value < least or value & (value - 1):
        raise ValueError(f"{name} = {value} is not a power of two from {least} on.")


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its output.

    Attributes:
        block_n: Output columns of a tile; divides the quant block of 128.
        num_warps: Warps of a program.
        num_stages: Loads in flight.
        swap: Weights as the first operand of the matrix product.
        unroll: Quant blocks along K of one loop iteration, in gate and up.

    """

    block_n: int
    num_warps: int
    num_stages: int
    swap: bool = False
    unroll: int = 1

    def __post_init__(self):
        if self.block_n < 16 or BLOCK % self.block_n:
            raise ValueError(
                f"block_n = {self.block_n}: a tile must be 16, 32, 64 or 128 columns, "
                "so that it lies in one quant block."
            )
        _check_power_of_two("num_warps", self.num_warps, least=1)
        _check_positive("num_stages", self.num_stages)
        _check_positive("unroll", self.unroll)

    def count(self, shard: BlockShard) -> int:
        """Tiles of the shard's span that hold real columns."""
        end = -(-(shard.lead + shard.size) // self.block_n)
        return end - shard.lead // self.block_n

    @property
    def launch_options(self) -> dict[str, int | bool]:
        return {
            "BLOCK_N": self.block_n,
            "NUM_STAGES": self.num_stages,
            "SWAP": self.swap,
            "num_warps": self.num_warps,
        }


@dataclass(frozen=True)
class Tiles:
    """The path for one number of tokens.

    Attributes:
        sort: Sort pairs by expert into blocks of ``block_m``. Otherwise each pair
            is a block, and down is summed over a token's experts as it goes.
        block_m: Pairs of a block.
        gate_up: Tile of gate and up.
        down: Tile of down.
        down_splits: Programs that share a block's output columns, if sorted.
        quantize_in_gate_up: Quantize the intermediate where it is computed and
            not where it is used. A tile must then hold whole groups.
        pdl: Let each kernel start while the one before it ends (Hopper). Pays
            while a kernel does not fill the GPU.

    """

    sort: bool
    block_m: int
    gate_up: Tile
    down: Tile
    down_splits: int = 1
    quantize_in_gate_up: bool = False
    pdl: bool = False

    def __post_init__(self):
        _check_power_of_two("block_m", self.block_m, least=16)
        _check_positive("down_splits", self.down_splits)
        for name in ("sort", "quantize_in_gate_up", "pdl"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} = {getattr(self, name)!r} is not a bool.")
        if self.quantize_in_gate_up and self.gate_up.block_n != BLOCK:
            raise ValueError(
                f"quantize_in_gate_up with block_n = {self.gate_up.block_n}: a tile "
                f"must be a whole group of {BLOCK} columns."
            )

    @classmethod
    def from_config(cls, config: dict) -> "Tiles":
        fields = dict(config)
        fields["gate_up"] = Tile(**config["gate_up"])
        fields["down"] = Tile(**config["down"])
        return cls(**fields)

    def fit(self, hidden: int) -> "Tiles":
        """Make the splits along ``hidden`` even."""
        blocks = hidden // BLOCK
        gate_up = replace(self.gate_up, unroll=math.gcd(blocks, self.gate_up.unroll))
        return replace(
            self, gate_up=gate_up, down_splits=math.gcd(blocks, self.down_splits)
        )


# Each call of a layer asks several times, and layers of a model ask the same.
@functools.lru_cache
def tiles_for(
    num_tokens: int, top_k: int, num_experts: int, hidden: int, shard: BlockShard
) -> Tiles:
    """Return tuned tiles for the nearest number of tokens, else the rule's.

    Args:
        num_tokens: Tokens of the call.
        top_k: Experts of a token.
        num_experts: Experts of the rank.
        hidden: Hidden size.
        shard: The rank's columns.

    """
    tuned = _tuned(num_experts, shard.size)
    if tuned:
        nearest = min(tuned, key=lambda tokens: abs(tokens - num_tokens))
        return tuned[nearest].fit(hidden)
    hopper = current_platform.is_device_capability(90)
    return rule(num_tokens * top_k / num_experts, hopper).fit(hidden)


@functools.cache
def _tuned(num_experts: int, size: int) -> dict[int, Tiles]:
    name = get_config_file_name(num_experts, size, "fp8_w8a8", [BLOCK, BLOCK])
    if (CONFIGS / name).exists():
        return read_config(CONFIGS / name)
    logger.info("No tuned tiles for the masked kernels (%s): using a rule.", name)
    return {}


def read_config(path: Path) -> dict[int, Tiles]:
    """Return tiles by number of tokens, fewest first, from a tuned file.

    Raises:
        ValueError: There are no entries; or one has fields that ``Tiles`` does not have
            or lacks some, has values that no kernel takes, or does not sort or not
            quantize where another's workspace then is smaller: the workspace that fits
            the largest call must fit all others.

    """
    entries = json.loads(path.read_text())
    if not isinstance(entries, dict) or not entries.keys() - {"triton_version"}:
        raise ValueError(f"{path}: no tiles by number of tokens. Mend or delete it.")
    entries.pop("triton_version", None)
    tuned = {}
    for tokens, entry in entries.items():
        try:
            _check_positive("tokens", int(tokens))
            tuned[int(tokens)] = Tiles.from_config(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: {tokens!r} must be a number of tokens and hold the fields of "
                f"Tiles, but: {error!r}. Mend or delete the file."
            ) from error
    tuned = dict(sorted(tuned.items()))
    for fewer, more in itertools.pairwise(tuned):
        _check_workspace(path, "sort", fewer, more, tuned, kept=True)
        _check_workspace(path, "quantize_in_gate_up", fewer, more, tuned, kept=False)
    return tuned


def _check_workspace(
    path: Path, field: str, fewer: int, more: int, tuned: dict[int, Tiles], kept: bool
) -> None:
    """Check that a field whose value ``kept`` takes more memory does not go back."""
    if getattr(tuned[fewer], field) is kept and getattr(tuned[more], field) is not kept:
        raise ValueError(
            f"{path}: {field} is {kept} for {fewer} tokens and {not kept} for {more}. "
            f"It must stay {kept} as tokens grow, since the workspace is as large as "
            "the largest call needs. Mend or delete the file."
        )


def rule(pairs_per_expert: float, hopper: bool) -> Tiles:
    """Return tiles by how many pairs an expert gets.

    Below one, experts are read about once without sorting. Further up a block
    should hold an expert's pairs, so that its weights are read once.
    """
    if pairs_per_expert < 0.125:
        tile = Tile(32, 4, 3, unroll=4) if hopper else Tile(32, 4, 3)
        return Tiles(False, 16, tile, _narrow(hopper, 5), pdl=hopper)
    if pairs_per_expert < 1:
        return Tiles(False, 16, _narrow(hopper, 4), _narrow(hopper, 4))
    if pairs_per_expert < 8:
        return Tiles(True, 16, _narrow(hopper, 4), _narrow(hopper, 3), 4)
    if pairs_per_expert < 32:
        return Tiles(True, 32, _narrow(hopper, 3), _narrow(hopper, 3), 4)
    return Tiles(True, 64, Tile(64, 4, 4 if hopper else 2), Tile(64, 4, 3), 2)


def _narrow(hopper: bool, num_stages: int) -> Tile:
    """For blocks of few pairs.

    Stages are fewer off Hopper: sm_89 and sm_120 have 99 KiB of shared memory.
    """
    if hopper:
        return Tile(64, 4, num_stages, swap=True)
    return Tile(32, 4, min(num_stages, 3))
