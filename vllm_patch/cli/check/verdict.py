# SPDX-License-Identifier: Apache-2.0
"""What becomes of a model at one tensor-parallel size, and the ways out."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vllm_patch.cli.check import sizes
from vllm_patch.cli.check.layers import Dimension, Layer, Layers
from vllm_patch.cli.check.ours import Ours, ours
from vllm_patch.cli.check.stock import (
    AUTO,
    DEEP_GEMM,
    HOPPER,
    Answer,
    Setting,
    answer,
)
from vllm_patch.wrappers import VARIABLE

AS_IT_IS, NEEDS_US, CANNOT_RUN = 0, 1, 2
# Fields that count heads, in vLLM's words where it has some.
HEADS = {
    "num_attention_heads": "Total number of attention heads",
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
}
VOCABULARY = "vocab_size"
# GPUs of one machine, among which --all chooses, and the padding that it puts up with.
ONE_MACHINE, MOST_PADDING = 8, 0.05


@dataclass(frozen=True)
class Row:
    """A layer, how many there are of it, and what becomes of each."""

    layer: Layer
    count: int
    stock: Answer
    ours: Ours
    setting: Setting

    @property
    def is_taken(self) -> bool:
        return self.ours.kind in ("compact", "padded")

    @property
    def runs(self) -> bool:
        return self.is_taken or self.stock.runs

    @property
    def block(self) -> int:
        """A quant block's length along the dimensions that ranks share."""
        return self.setting.block[self.layer.kind == "row"]

    @property
    def cut(self) -> list[Dimension]:
        """The dimensions that are cut inside a quant block, each once."""
        if self.layer.undivided(self.setting.tp):
            return []
        dimensions = dict.fromkeys(self.layer.dimensions(self.setting.tp))
        return [each for each in dimensions if each.is_cut(self.block)]

    def bytes(self, rank: int, how: str) -> int:
        """Return bytes of all these on a rank.

        Args:
            rank: One of those that share the layer.
            how: ``real``, ``stock``, ``ours``, or ``padded`` where ours may be compact.

        """
        setting = self.setting
        place = self.layer, setting.tp, setting.block, rank
        if how == "real":
            return self.count * sizes.sliced(*place, is_padded=False)
        if how != "stock" and self.is_taken:
            is_padded = "padded" in (how, self.ours.kind)
            return self.count * sizes.sliced(*place, is_padded)
        return self.count * sizes.in_stock(*place, self.stock)


@dataclass(frozen=True)
class Verdict:
    """A model at one size.

    Attributes:
        model: Its quantized layers.
        text: The language model's fields of config.json.
        setting: Where it runs.

    """

    model: Layers
    text: dict[str, Any]
    setting: Setting

    @cached_property
    def rows(self) -> list[Row]:
        rows = []
        for layer, count in self.model.found.items():
            found = answer(layer, self.setting, self.text)
            taken = Ours("left", "vLLM cannot share it out")
            if not layer.undivided(self.setting.tp):
                taken = ours(layer, self.setting, self.text)
            rows.append(Row(layer, count, found, taken, self.setting))
        return rows

    @property
    def undivided(self) -> str | None:
        """Why vLLM starts no model at this size, whatever its blocks are."""
        return self._undivided_fields or next(iter(self._undivided.values()), None)

    @cached_property
    def _undivided(self) -> dict[Layer, str]:
        """Why ranks cannot share layers of the model evenly."""
        tp = self.setting.tp
        errors = {layer: layer.undivided(tp) for layer in self.model.found}
        return {
            layer: f"{each} are not divisible by TP {tp}."
            for layer, each in errors.items()
            if each
        }

    @property
    def undivided_by(self) -> str | None:
        """The field, or the part of a layer, that ranks cannot share evenly."""
        if name := self._undivided_field:
            return f"{name} {self.text[name]}"
        layer = next(iter(self._undivided), None)
        return layer and layer.undivided(self.setting.tp)

    @property
    def _undivided_field(self) -> str | None:
        tp = self.setting.tp
        for name in HEADS:
            heads = self.text.get(name)
            if type(heads) is int and heads % tp:
                return name
        vocabulary = self.text.get(VOCABULARY)
        # vLLM rounds it up.
        if type(vocabulary) is int and -(-vocabulary // 64) * 64 % tp:
            return VOCABULARY
        return None

    @property
    def _undivided_fields(self) -> str | None:
        name, tp = self._undivided_field, self.setting.tp
        if name is None:
            return None
        size = self.text[name]
        if name == VOCABULARY:
            return f"{name} {size}, rounded up to 64, is not divisible by {tp}."
        return (
            f"{HEADS[name]} ({size}) must be divisible by tensor parallel size ({tp})."
        )

    @property
    def code(self) -> int:
        """The exit code; a layer that is not known may do anything."""
        if self.undivided or self.model.unknown or not all(r.runs for r in self.rows):
            return CANNOT_RUN
        is_as_it_is = self.setting.is_built_in or all(r.stock.runs for r in self.rows)
        return AS_IT_IS if is_as_it_is else NEEDS_US

    def largest(self, how: str) -> int | None:
        """Return bytes of the rank with the most; None if it does not run so."""
        if self.undivided or any(
            not (row.stock.runs if how == "stock" else row.runs) for row in self.rows
        ):
            return None
        ranks = range(self.setting.tp)
        return max(sum(row.bytes(rank, how) for row in self.rows) for rank in ranks)

    @property
    def is_cut(self) -> bool:
        return any(row.cut and row.ours.kind != "stock" for row in self.rows)

    def at(self, **changes: Any) -> "Verdict":
        """Return the verdict on another setting."""
        return Verdict(self.model, self.text, replace(self.setting, **changes))

    def ways_out(self) -> list[str]:
        """Return what else there is than this package as it is, with its price."""
        if self.undivided:
            kinds = {layer.kind for layer in self._undivided}
            is_way = kinds == {"experts"} and not self._undivided_fields
            return [self._smaller(), self._experts()] if is_way else []
        if not self.is_cut:
            return []
        if self.setting.tp == 1:
            return self._others()
        return [self._smaller(), self._experts(), *self._others()]

    def _smaller(self) -> str:
        for tp in range(self.setting.tp - 1, 0, -1):
            other = self.at(tp=tp)
            if not other.undivided and not other.is_cut and other.code == AS_IT_IS:
                here, there = self.largest("real"), other.largest("real")
                more = f", {there / here:.2f} times this" if here else ""
                return f"TP {tp} keeps blocks whole: {gb(there)} a rank{more}"
        return "no smaller TP runs in stock vLLM with whole blocks"

    def _experts(self) -> str:
        experts = [
            row
            for row in self.rows
            if row.layer.kind == "experts" and (row.cut or row.layer in self._undivided)
        ]
        if not experts:
            return "expert parallelism does not help: no experts are cut"
        one = replace(self.setting, tp=1)
        alone = (answer(row.layer, one, self.text) for row in experts)
        if why := next((each.text for each in alone if not each.runs), None):
            return f"expert parallelism does not help: {why}"
        said = "whole experts; each step waits for the rank with the busiest ones"
        others = [row for row in self.rows if row not in experts and not row.stock.runs]
        if others:
            names = ", ".join(row.layer.name for row in others)
            said += f". It does not help {names}"
        return f"--enable-expert-parallel: {said}"

    def _others(self) -> list[str]:
        found = []
        most = self.largest("padded")
        if most and any(row.ours.kind == "compact" for row in self.rows):
            said = f"any of vLLM's kernels, {gb(most)} a rank"
            found.append(f"{VARIABLE}=padded: {said}")
        other = self.at(backend=DEEP_GEMM)
        idle = {r.stock.text for r in other.rows if r.stock.kind == "shared"}
        is_auto = (self.setting.platform, self.setting.backend) == (HOPPER, AUTO)
        is_auto &= not self.setting.is_built_in
        if is_auto and other.code == AS_IT_IS and idle:
            said = f"{' or '.join(sorted(idle))}, {gb(other.largest('stock'))} a rank"
            found.append(f"--moe-backend {DEEP_GEMM}: {said}")
        return found


def chosen(verdicts: list[Verdict]) -> Verdict | None:
    """Return the largest size of one machine that runs with hardly any padding."""

    def is_good(verdict: Verdict) -> bool:
        real, held = verdict.largest("real"), verdict.largest("ours")
        if verdict.code == CANNOT_RUN or verdict.setting.tp > ONE_MACHINE:
            return False
        return not real or held <= real * (1 + MOST_PADDING)

    return max(filter(is_good, verdicts), key=lambda v: v.setting.tp, default=None)


def shared_blocks(dimension: Dimension, block: int) -> dict[int, list[int]]:
    """Return quant blocks that several parts hold columns of, with their ranks."""
    held: dict[int, list[int]] = {}
    for part in range(dimension.parts):
        rank = part * dimension.replicas
        shard = dimension.shard(block, rank)
        for number in range(shard.first_block, shard.first_block + shard.num_blocks):
            held.setdefault(number, []).append(rank)
    return {number: ranks for number, ranks in held.items() if len(ranks) > 1}


def gb(size: int | None) -> str:
    """Return bytes for people."""
    if size is None:
        return "-"
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
