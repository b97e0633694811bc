# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Cuts a rank's slice out of a checkpoint tensor, with its padding."""

from dataclasses import dataclass, replace

import torch

from .shard import BlockShard


@dataclass(frozen=True)
class Window:
    """What to cut from one dimension of a checkpoint tensor, and where it goes.

    ``[start, start + size)`` of ``total`` goes to ``[lead, lead + size)`` of
    ``span``; the rest of ``span`` is zero.
    """

    total: int
    start: int
    size: int
    lead: int
    span: int

    @classmethod
    def of_elements(cls, shard: BlockShard, total: int) -> "Window":
        return cls(total, shard.start, shard.size, shard.lead, shard.span)

    @classmethod
    def of_blocks(cls, shard: BlockShard, total: int, block: int) -> "Window":
        blocks = shard.num_blocks
        return cls(-(-total // block), shard.first_block, blocks, 0, blocks)

    @classmethod
    def whole(cls, total: int) -> "Window":
        return cls(total, 0, total, 0, total)

    def without_padding(self) -> "Window":
        return replace(self, lead=0, span=self.size)

    def cut(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the padded slice of ``tensor``, ``span`` long in ``dim``."""
        real = tensor.narrow(dim, self.start, self.size)
        if self.size == self.span:
            return real
        pad = [0, 0] * (tensor.ndim - 1 - dim)
        pad += [self.lead, self.span - self.lead - self.size]
        return torch.nn.functional.pad(real, pad)
