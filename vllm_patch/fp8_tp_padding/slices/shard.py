# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where a tensor-parallel rank's slice lies on a checkpoint's block grid."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockShard:
    """One rank's slice of a block-quantized dimension, in elements.

    Element ``j`` of the rank is element ``start + j`` of the checkpoint and
    element ``lead + j`` of the rank's padded buffer. Its scale is
    ``(lead + j) // block`` in the rank's scales, which is the checkpoint's
    ``first_block + (lead + j) // block``: no scale is averaged or moved.

    Attributes:
        start: First element of the rank in the checkpoint.
        size: Elements of the rank.
        lead: Padding before the real elements: ``start``'s offset in its block.
        span: Elements of the padded buffer, a whole number of blocks.
        first_block: The checkpoint's block that holds ``start``.
        num_blocks: Blocks of the padded buffer; each holds real elements.

    """

    start: int
    size: int
    lead: int
    span: int
    first_block: int
    num_blocks: int


def block_shard(total: int, block: int, tp_rank: int, tp_size: int) -> BlockShard:
    """Place rank ``tp_rank``'s slice of ``total`` elements on the block grid.

    Args:
        total: Elements of the unsharded dimension; its last block may be partial.
        block: Elements of one quant block.
        tp_rank: Rank, ``0 <= tp_rank < tp_size``.
        tp_size: Ranks that share the dimension equally.

    Raises:
        ValueError: A size is not positive, the rank is out of range, or
            ``tp_size`` does not divide ``total``.

    """
    for name, value in (("total", total), ("block", block), ("tp_size", tp_size)):
        if value <= 0:
            raise ValueError(f"{name} = {value} must be positive.")
    if not 0 <= tp_rank < tp_size:
        raise ValueError(
            f"tp_rank = {tp_rank} is not a rank of tp_size = {tp_size}: "
            f"it must be in [0, {tp_size})."
        )
    if total % tp_size != 0:
        raise ValueError(f"total = {total} is not divisible by tp_size = {tp_size}.")
    size = total // tp_size
    start = tp_rank * size
    first_block, lead = divmod(start, block)
    num_blocks = -(-(lead + size) // block)
    return BlockShard(
        start=start,
        size=size,
        lead=lead,
        span=num_blocks * block,
        first_block=first_block,
        num_blocks=num_blocks,
    )
