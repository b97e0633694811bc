# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loads a checkpoint's linear weights into parameters padded to whole blocks."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from types import MethodType
from typing import Literal

import torch

from .tensor_check import (
    REMEDY,
    check_weight_dtype,
    first_bad_scale,
    forgotten_on_error,
)
from .window import Window

QKV_SHARDS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class LinearParameter:
    """A parameter that holds padded slices of logical shards, one after the other.

    Attributes:
        name: Name of the parameter, ``[outputs, inputs]``.
        kind: What it holds.
        outputs: Part of each logical shard's output dimension.
        input: Part of the input dimension.
        totals: Output elements of each logical shard in the checkpoint.
        unit: Elements of the output dimension that one row stands for.

    """

    name: str
    kind: Literal["weight", "scale"]
    outputs: list[Window]
    input: Window
    totals: list[int]
    unit: int

    def slot(self, data: torch.Tensor, index: int) -> torch.Tensor:
        """Return the view of the parameter that logical shard ``index`` fills."""
        offset = sum(window.span for window in self.outputs[:index])
        return data.narrow(0, offset, self.outputs[index].span)

    def load(
        self, where: str, data: torch.Tensor, index: int, tensor: torch.Tensor
    ) -> None:
        """Fill the slot of logical shard ``index``, padding included."""
        output = self.outputs[index]
        expected = output.total, self.input.total
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{where} has shape {tuple(tensor.shape)} for logical shard {index}, "
                f"but the model needs {expected}. Check the sizes and "
                "weight_block_size in config.json against the checkpoint, and load "
                "an unsharded one."
            )
        if self.kind == "weight":
            check_weight_dtype(where, tensor, data.dtype)
        self.slot(data, index).copy_(self.input.cut(output.cut(tensor, 0), 1))

    def check_scales(self, prefix: str, data: torch.Tensor) -> None:
        """Raise ValueError if a loaded block scale is not finite and positive."""
        for index, output in enumerate(self.outputs):
            found = first_bad_scale(self.slot(data, index))
            if found is None:
                continue
            (row, column), value = found
            block = row + output.start, column + self.input.start
            raise ValueError(
                f"{prefix}: {self.name} of logical shard {index} holds the scale "
                f"{value} for block {block} of the checkpoint; {REMEDY}"
            )

    def split(
        self, where: str, indices: list[int], fused: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Cut a tensor that is fused on disk into its logical shards."""
        if len(indices) == 1:
            yield indices[0], fused
            return
        ends = list(accumulate(self.totals[index] for index in indices))
        expected = -(-ends[-1] // self.unit)
        if fused.shape[:1] != (expected,):
            raise ValueError(
                f"{where} is fused on disk and has shape {tuple(fused.shape)}, but "
                f"logical shards {indices} need {expected} rows. Use a checkpoint with "
                "separate tensors, or one that was quantized after they were fused."
            )
        starts = [0, *ends[:-1]]
        for index, start, end in zip(indices, starts, ends, strict=True):
            # A shard inside one block has that block's scale.
            if start % self.unit and start // self.unit != (end - 1) // self.unit:
                raise ValueError(
                    f"{where} is fused on disk, and logical shard {index} starts at "
                    f"row {start}, inside a quant block of {self.unit}: its scales "
                    "cannot be told apart. Use a checkpoint with separate tensors."
                )
            rows = slice(start // self.unit, -(-end // self.unit))
            yield index, fused[rows]


def padded_linear_loader(
    layer: torch.nn.Module,
    stock_loader: MethodType,
    parameter: LinearParameter,
    loaded: set[tuple[str, int]],
) -> MethodType:
    """Return ``stock_loader``'s replacement for one padded parameter.

    Args:
        layer: The linear layer that owns the parameter.
        stock_loader: The layer's loader; its signature is kept.
        parameter: What the parameter holds.
        loaded: Gets (parameter name, logical shard) of every tensor loaded.

    """

    @functools.wraps(stock_loader.__func__)
    def weight_loader(layer, param, loaded_weight, loaded_shard_id=None):
        where = f"{layer.prefix}: {parameter.name}"
        if isinstance(loaded_shard_id, (int, str)):
            indices = [QKV_SHARDS.get(loaded_shard_id, loaded_shard_id)]
        elif loaded_shard_id is None:
            indices = list(range(len(parameter.outputs)))
        else:
            indices = list(loaded_shard_id)
        with forgotten_on_error(loaded):
            for index, tensor in parameter.split(where, indices, loaded_weight):
                parameter.load(where, param.data, index, tensor)
                loaded.add((parameter.name, index))

    return MethodType(weight_loader, layer)


def check_loaded(
    layer: torch.nn.Module,
    parameters: list[LinearParameter],
    loaded: set[tuple[str, int]],
) -> None:
    """Raise ValueError if a load left out a tensor or brought an impossible scale.

    ``loaded`` is empty when weights came without the loaders (dummy weights,
    sharded state); there is nothing to check then.
    """
    if not loaded:
        return
    for parameter in parameters:
        for index in range(len(parameter.outputs)):
            if (parameter.name, index) not in loaded:
                raise ValueError(
                    f"{layer.prefix}: {parameter.name} of logical shard {index} is "
                    "missing from the checkpoint. Download or quantize the checkpoint "
                    "again; every FP8 weight needs its block scales."
                )
        if parameter.kind == "scale":
            parameter.check_scales(layer.prefix, getattr(layer, parameter.name).data)
