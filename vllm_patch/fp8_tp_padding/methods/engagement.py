# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Says once per model which layers are cut, how they are stored, and what it costs."""

from collections import Counter
from dataclasses import dataclass

from vllm.logger import init_logger

from ..slices.shard import block_shard
from .store import Compact, Store

logger = init_logger("vllm.fp8_tp_padding")


@dataclass(frozen=True)
class CutSize:
    """A dimension that tensor parallelism cuts inside quant blocks.

    Attributes:
        layer_kind: What the log line calls the layers.
        total: Elements of the unsharded dimension.
        block: Elements of one quant block.
        tp_size: Ranks that share it.
        store: How the layers' weights are stored.

    """

    layer_kind: str
    total: int
    block: int
    tp_size: int
    store: Store

    @property
    def size(self) -> int:
        return self.total // self.tp_size

    def spans(self) -> list[int]:
        """Padded sizes that the ranks get, smallest first."""
        ranks = range(self.tp_size)
        shards = [block_shard(self.total, self.block, r, self.tp_size) for r in ranks]
        return sorted({shard.span for shard in shards})

    def describe(self, layers: int) -> str:
        """Return the log line's part on ``layers`` layers of this size."""
        return (
            f"{layers} {self.layer_kind} layers, {self.total} / TP {self.tp_size} = "
            f"{self.size} {self.store.describe(self.spans())}"
        )

    @property
    def added(self) -> int:
        """Elements of padding on the rank that has the most."""
        return 0 if self.store == Compact() else max(self.spans()) - self.size


_layers: Counter[CutSize] = Counter()
_column_bytes: Counter[CutSize] = Counter()


def record(size: CutSize, column_bytes: int) -> None:
    """Note a cut layer whose weights take ``column_bytes`` per element of the size."""
    _layers[size] += 1
    _column_bytes[size] += column_bytes


def report(tp_rank: int) -> None:
    """Log the layers noted so far, from rank 0, and forget them.

    vLLM builds every layer of a model before it processes the weights of the
    first one, so a call from there covers the model.
    """
    if _layers and tp_rank == 0:
        parts = [size.describe(count) for size, count in _layers.items()]
        if added := sum(size.added * each for size, each in _column_bytes.items()):
            parts.append(f"{added / 2**20:.1f} MiB of padding on the largest rank")
        logger.info(
            "FP8 layers cut inside quant blocks: %s. "
            "VLLM_FP8_TP_PADDING=off goes back to stock vLLM.",
            "; ".join(parts),
        )
    _layers.clear()
    _column_bytes.clear()
