# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Says once per model which layers are cut, how they are stored, and what it costs."""

from collections import Counter
from dataclasses import dataclass

from vllm.logger import init_logger

from .shard import block_shard

logger = init_logger("vllm.fp8_tp_padding")


@dataclass(frozen=True)
class PaddedSize:
    """A dimension that was padded, and the ranks that share it.

    Attributes:
        layer_kind: What the log line calls the layers.
        total: Elements of the unsharded dimension.
        block: Elements of one quant block.
        tp_size: Ranks that share it.
        padded_because: Why weights are padded, where they need not always be; None
            if they are stored as they are.

    """

    layer_kind: str
    total: int
    block: int
    tp_size: int
    padded_because: str | None = ""

    @property
    def size(self) -> int:
        return self.total // self.tp_size

    def spans(self) -> list[int]:
        """Padded sizes that the ranks get, smallest first."""
        ranks = range(self.tp_size)
        shards = [block_shard(self.total, self.block, r, self.tp_size) for r in ranks]
        return sorted({shard.span for shard in shards})


_layers: Counter[PaddedSize] = Counter()
_column_bytes: Counter[PaddedSize] = Counter()


def record(size: PaddedSize, column_bytes: int) -> None:
    """Note a padded layer whose weights take ``column_bytes`` per padded element."""
    _layers[size] += 1
    _column_bytes[size] += column_bytes


def report(tp_rank: int) -> None:
    """Log the layers noted so far, from rank 0, and forget them.

    vLLM builds every layer of a model before it processes the weights of the
    first one, so a call from there covers the model.
    """
    if _layers and tp_rank == 0:
        parts = [_describe(size, count) for size, count in _layers.items()]
        if added := sum(map(_added_bytes, _layers)):
            parts.append(f"{added / 2**20:.1f} MiB of padding on the largest rank")
        logger.info(
            "FP8 layers cut inside quant blocks: %s. "
            "VLLM_FP8_TP_PADDING=off goes back to stock vLLM.",
            "; ".join(parts),
        )
    _layers.clear()
    _column_bytes.clear()


def _describe(size: PaddedSize, count: int) -> str:
    layers = (
        f"{count} {size.layer_kind} layers, {size.total} / TP {size.tp_size} = "
        f"{size.size}"
    )
    if size.padded_because is None:
        return f"{layers} stored as they are, for masked Triton kernels"
    spans = " or ".join(map(str, size.spans()))
    reason = f" ({size.padded_because})" if size.padded_because else ""
    return f"{layers} padded to {spans}{reason}"


def _added_bytes(size: PaddedSize) -> int:
    if size.padded_because is None:
        return 0
    return (max(size.spans()) - size.size) * _column_bytes[size]
