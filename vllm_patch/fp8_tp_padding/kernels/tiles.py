# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What tiles of the masked kernels are: their fields and what these may be."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ..slices.shard import BlockShard
from .fp8_quant import BLOCK

# Beyond, shared memory holds no tile.
MOST_STAGES = 16
# Pairs, times those of a block, up to which programs find these by themselves: sorting
# beforehand is a launch more, and comparing more takes longer, and registers.
MOST_FOUND = 512 * 16
# Pairs of a block for warps that specialize, as many as wgmma takes; and how many such
# blocks they multiply by the same weights.
SPECIALIZED_M, SPECIALIZED_BLOCKS = 64, 2


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
        check_positive("block_n", self.block_n)
        if self.block_n < 16 or BLOCK % self.block_n:
            raise ValueError(
                f"block_n = {self.block_n}: a tile must be 16, 32, 64 or 128 columns, "
                "so that it lies in one quant block."
            )
        check_power_of_two("num_warps", self.num_warps, least=1)
        check_positive("num_stages", self.num_stages, most=MOST_STAGES)
        check_positive("unroll", self.unroll)
        check_bool("swap", self.swap)

    def count(self, shard: BlockShard) -> int:
        """Tiles of the shard's span that hold real columns."""
        end = -(-(shard.lead + shard.size) // self.block_n)
        return end - shard.lead // self.block_n

    def fit(self, hidden: int) -> "Tile":
        """Make the unrolled steps along ``hidden`` even."""
        return replace(self, unroll=math.gcd(hidden // BLOCK, self.unroll))

    @property
    def launch_options(self) -> dict[str, int | bool]:
        return {
            "BLOCK_N": self.block_n,
            "NUM_STAGES": self.num_stages,
            "SWAP": self.swap,
            "num_warps": self.num_warps,
        }


@dataclass(frozen=True)
class PairTiles:
    """For few tokens: each pair is alone, and down sums a token's experts.

    Attributes:
        block_m: 0, as each pair is alone; so is ``group_m``.
        specialized: False; all three are as of ``SortedTiles``.
        gate_up: Tile of gate and up.
        down: Tile of down.
        gate_up_splits: Programs that share a tile of gate and up along ``hidden``.
        pdl: Let each kernel start while the one before it ends (Hopper). Pays
            while a kernel does not fill the GPU.

    """

    block_m: ClassVar[int] = 0
    group_m: ClassVar[int] = 0
    specialized: ClassVar[bool] = False
    gate_up: Tile
    down: Tile
    gate_up_splits: int = 1
    pdl: bool = False

    def __post_init__(self):
        check_positive("gate_up_splits", self.gate_up_splits)
        check_bool("pdl", self.pdl)

    def fit(self, hidden: int) -> "PairTiles":
        """Make the splits along ``hidden`` even."""
        splits = math.gcd(hidden // BLOCK, self.gate_up_splits)
        gate_up = self.gate_up.fit(hidden // splits)
        return replace(self, gate_up=gate_up, gate_up_splits=splits)


@dataclass(frozen=True)
class SortedTiles:
    """For many tokens: pairs come in blocks of one expert.

    Attributes:
        block_m: Pairs of a block.
        gate_up: Tile of gate and up.
        down: Tile of down.
        down_splits: Programs that share a block's output columns.
        pdl: As of ``PairTiles``.
        specialized: Multiply by gate and up with warps that specialize (Hopper), two
            blocks at a time; with ``gate_up`` where those do not run.

    """

    block_m: int
    gate_up: Tile
    down: Tile
    down_splits: int = 1
    pdl: bool = False
    specialized: bool = False

    def __post_init__(self):
        check_power_of_two("block_m", self.block_m, least=16)
        check_positive("down_splits", self.down_splits)
        check_bool("pdl", self.pdl)
        check_bool("specialized", self.specialized)
        if self.specialized and (self.block_m != SPECIALIZED_M or self.pdl):
            raise ValueError(
                f"specialized = True with block_m = {self.block_m}, pdl = {self.pdl}: "
                f"warps that specialize take blocks of {SPECIALIZED_M} pairs, and "
                "start when the kernel before them has ended."
            )

    @property
    def group_m(self) -> int:
        """Pairs of whole blocks that an expert's pairs are filled up to."""
        return self.block_m * (SPECIALIZED_BLOCKS if self.specialized else 1)

    def fit(self, hidden: int) -> "SortedTiles":
        """Make the splits along ``hidden`` even."""
        splits = math.gcd(hidden // BLOCK, self.down_splits)
        return replace(self, gate_up=self.gate_up.fit(hidden), down_splits=splits)


Tiles = PairTiles | SortedTiles


def are_found(num_pairs: int, block_m: int) -> bool:
    """Whether programs find the pairs of their block by themselves."""
    return num_pairs * block_m <= MOST_FOUND


def check_positive(name: str, value: int, most: float = math.inf) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} = {value!r} is not a positive integer.")
    if value > most:
        raise ValueError(f"{name} = {value} is more than {most}.")


def check_power_of_two(name: str, value: int, least: int) -> None:
    check_positive(name, value)
    if value < least or value & (value - 1):
        raise ValueError(f"{name} = {value} is not a power of two from {least} on.")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} = {value!r} is not a bool.")
