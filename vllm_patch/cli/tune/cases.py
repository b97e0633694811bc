# SPDX-License-Identifier: Apache-2.0
"""A model's experts whose tiles can be tuned, as ``vllm-patch check`` knows them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_patch.cli import UsageError
from vllm_patch.cli.check import checkpoint
from vllm_patch.cli.check import command as check
from vllm_patch.cli.check.stock import BLOCK
from vllm_patch.cli.check.verdict import Row
from vllm_patch.fp8_tp_padding.slices.shard import BlockShard, block_shard

# As models of vLLM's call the experts of a token.
TOP_K = "num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts"
# The narrowest tiles that are tried for many tokens.
TILE = 64


@dataclass(frozen=True)
class Case:
    """Experts that tensor parallelism cuts inside a quant block.

    Attributes:
        experts: Experts of a layer.
        top_k: Experts of a token.
        hidden: Hidden size.
        total: Intermediate columns of an expert, over all ranks.
        tp: Tensor-parallel size.

    """

    experts: int
    top_k: int
    hidden: int
    total: int
    tp: int

    @property
    def rank(self) -> int:
        """The rank for which all others wait: its columns touch the most tiles."""
        return max(range(self.tp), key=lambda rank: self._tiles(self._shard(rank)))

    @property
    def shard(self) -> BlockShard:
        return self._shard(self.rank)

    def _shard(self, rank: int) -> BlockShard:
        return block_shard(self.total, BLOCK, rank, self.tp)

    @staticmethod
    def _tiles(shard: BlockShard) -> tuple[int, int]:
        end = -(-(shard.lead + shard.size) // TILE)
        return end - shard.lead // TILE, shard.num_blocks

    def __str__(self) -> str:
        shard = self.shard
        return (
            f"{self.experts} experts x {shard.size} columns, top-{self.top_k}, hidden "
            f"{self.hidden}, as rank {self.rank} of {self.tp}"
        )


def cases(model: str, tp: int) -> list[Case]:
    """Return the experts of a model that masked kernels run, each size once.

    Args:
        model: A checkpoint's folder, a config.json, or a hub id.
        tp: Tensor-parallel size.

    Raises:
        UsageError: It has none, or cannot be read.

    """
    verdict = check.verdict(checkpoint.read(model), tp)
    if verdict.undivided:
        raise UsageError(f"{model} at TP {tp}: {verdict.undivided}")
    rows = [row for row in verdict.rows if row.layer.kind == "experts"]
    compact = [row for row in rows if row.ours.kind == "compact" and _is_gated(row)]
    if not compact:
        said = "; ".join(_refusals(rows)) or "no routed experts are known of it"
        raise UsageError(f"{model} at TP {tp}: there are no tiles to tune: {said}.")
    top_k = _top_k(model, verdict.text)
    found = (
        Case(row.layer.experts, top_k, row.layer.inputs, row.layer.outputs[0], tp)
        for row in compact
    )
    # A file is for a number of experts and columns.
    return [*{(case.experts, case.total): case for case in found}.values()]


def _refusals(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        why = row.ours.why or "no quant block is cut, so vLLM's own kernels run it"
        if row.ours.kind == "compact":
            why = "it has no gate, and gate and up are what is timed"
        yield f"{row.layer.name}: {why}"


def _is_gated(row: Row) -> bool:
    return len(row.layer.outputs) == 2


def _top_k(model: str, text: dict[str, Any]) -> int:
    for name in TOP_K:
        if type(value := text.get(name)) is int and value > 0:
            return value
    raise UsageError(
        f"{model}: config.json does not say how many experts a token has. Give a "
        f"config.json with {TOP_K[0]}."
    )
