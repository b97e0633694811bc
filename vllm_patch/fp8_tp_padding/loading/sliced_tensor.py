# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A checkpoint tensor of which a rank holds a slice: checked, loaded and judged.

vLLM's own loaders split the rows of a scale by ``rows // tp_size``, which drops or
shifts scales when a rank starts inside a block. Here every slice is cut out of the
full tensor. Each load writes the whole slot, zeros included, so no byte of
uninitialised or stale memory survives a load or a reload.
"""

from dataclasses import dataclass
from typing import Literal, NoReturn

import torch

from vllm.config import get_current_vllm_config

from ..slices.window import Window


@dataclass(frozen=True)
class SlicedTensor:
    """One tensor of a checkpoint, and the slot of a parameter that its slice fills.

    Attributes:
        parameter: Name of the layer's parameter.
        shard: vLLM's name for the tensor: ``"w1"``, or the index of a logical shard.
        kind: What it holds. A checkpoint must have weights and scales; biases start
            at zero.
        windows: The rank's part of each dimension; of a scale, in blocks.
        offset: First row of the slot in the parameter (of one expert).

    """

    parameter: str
    shard: str | int
    kind: Literal["weight", "scale", "bias"]
    windows: tuple[Window, ...]
    offset: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unsharded tensor in the checkpoint."""
        return tuple(window.total for window in self.windows)

    def label(self, expert: int | None) -> str:
        """Return what messages call the tensor, after its name."""
        if expert is None:
            return f"logical shard {self.shard}"
        return f"expert {expert} ({self.shard})"

    def slot(self, data: torch.Tensor) -> torch.Tensor:
        """Return the view of a parameter, or of one expert's, that is filled."""
        return data.narrow(0, self.offset, self.windows[0].span)

    def load(self, data: torch.Tensor, tensor: torch.Tensor) -> None:
        """Fill the slot from the unsharded tensor, padding included."""
        for dim, window in enumerate(self.windows):
            tensor = window.cut(tensor, dim)
        self.slot(data).copy_(tensor)

    def has_clean_padding(self, data: torch.Tensor) -> bool:
        """Whether all outside the slice is zero, in a parameter or in all experts'."""
        first = data.ndim - len(self.windows)
        slot = data.narrow(first, self.offset, self.windows[0].span)
        for dim, window in enumerate(self.windows, first):
            end = window.lead + window.size
            before = slot.narrow(dim, 0, window.lead)
            after = slot.narrow(dim, end, window.span - end)
            if any(part.float().any() for part in (before, after)):
                return False
        return True

    def problem(self, value: torch.Tensor, dtype: torch.dtype) -> str | None:
        """Return why ``value`` cannot be this tensor of the checkpoint, or None."""
        if tuple(value.shape) != self.shape:
            return self._wrong_shape(value)
        if self.kind == "weight" and value.dtype != dtype:
            return (
                f"has dtype {value.dtype}, but a block-quantized FP8 weight is "
                f"{dtype}. List the layer in the checkpoint's modules_to_not_convert "
                "if it is not quantized."
            )
        if self.kind == "scale" and not value.is_floating_point():
            return (
                f"has dtype {value.dtype}, but block scales are floating-point "
                "numbers. Quantize the checkpoint again."
            )
        return None

    def _wrong_shape(self, value: torch.Tensor) -> str:
        found = tuple(value.shape)
        message = f"has shape {found}, but the model needs {self.shape}"
        for dim, window in enumerate(self.windows):
            split = found[dim : dim + 1] in ((window.size,), (window.span,))
            if split and window.size != window.total:
                return (
                    f"{message}: it looks already split for tensor parallelism "
                    f"({found[dim]} of {window.total} in dimension {dim}). Load the "
                    "unsharded checkpoint."
                )
        if self.kind == "scale":
            message += ", one scale for each quant block"
        return (
            f"{message}. Check the layer's sizes and weight_block_size in config.json "
            "against the checkpoint."
        )

    def check_scales(self, name: str, data: torch.Tensor, expert: int | None) -> None:
        """Raise ValueError if a loaded block scale is not finite and positive."""
        found = _first_bad(self.slot(data))
        if found is None:
            return
        index, value = found
        starts = (window.start for window in self.windows)
        block = tuple(i + start for i, start in zip(index, starts, strict=True))
        raise ValueError(
            f"{name}: {self.parameter} of {self.label(expert)} holds the scale {value} "
            f"for block {block} of the checkpoint; a block scale must be finite and "
            "positive. The checkpoint is damaged or was quantized wrongly: download "
            "or quantize it again."
        )


def _first_bad(scales: torch.Tensor) -> tuple[list[int], float] | None:
    """Return index and value of the first impossible scale, or None."""
    values = scales.float()
    bad = ~(torch.isfinite(values) & (values > 0))
    if not bad.any():
        return None
    index = bad.nonzero()[0].tolist()
    return index, values[tuple(index)].item()


class SlicedTensors:
    """The sliced tensors of a layer, and which of them a load has brought.

    Args:
        layer: Its name, for messages.
        tensors: What the checkpoint has for it.
        experts: Experts of the rank, each with all of the tensors; None where the
            layer has no experts.

    """

    def __init__(self, layer: str, tensors: list[SlicedTensor], experts: int | None):
        self.layer = layer
        self.tensors = tensors
        self.experts: list[int | None] = (
            [None] if experts is None else [*range(experts)]
        )
        self._loaded: set[tuple[SlicedTensor, int | None]] = set()
        self._refused = False
        self._load_format = str(get_current_vllm_config().load_config.load_format)

    def of(self, parameter: str) -> dict[str | int, SlicedTensor]:
        """Return the tensors of a parameter by shard, in the order of their slots."""
        return {t.shard: t for t in self.tensors if t.parameter == parameter}

    def load(
        self,
        tensor: SlicedTensor,
        param: torch.Tensor,
        value: torch.Tensor,
        name: str,
        expert: int | None = None,
    ) -> None:
        """Check and load one tensor.

        Args:
            tensor: Which one it is.
            param: The layer's parameter.
            value: The unsharded tensor.
            name: The tensor's name, for messages.
            expert: The rank's expert that it belongs to.

        """
        if problem := tensor.problem(value, param.dtype):
            self.refuse(f"{name} of {tensor.label(expert)} {problem}")
        tensor.load(param.data if expert is None else param.data[expert], value)
        self._loaded.add((tensor, expert))

    def refuse(self, message: str) -> NoReturn:
        """Raise ValueError, and forget the load.

        A later one starts anew and must be complete by itself.
        """
        self._loaded.clear()
        self._refused = True
        raise ValueError(f"{self.layer}: {message}")

    def check_loaded(self, layer: torch.nn.Module) -> None:
        """Raise ValueError if a load left out a tensor or brought an impossible scale.

        Where weights came without the loaders, dummy weights are as they are, and a
        sharded state has to be one of such slices. Scales are looked at once they are
        all there and not one by one, because vLLM's sparse updates mark unchanged ones
        with NaN.
        """
        loaded, self._loaded = self._loaded, set()
        refused, self._refused = self._refused, False
        if not loaded and not refused:
            if "sharded" in self._load_format:
                self._check_padding(layer)
            return
        self._check_complete(loaded)
        for tensor in self.tensors:
            if tensor.kind != "scale":
                continue
            data = getattr(layer, tensor.parameter).data
            if self.experts == [None]:
                tensor.check_scales(self.layer, data, None)
            elif _first_bad(data.narrow(1, tensor.offset, tensor.windows[0].span)):
                for expert in self.experts:
                    tensor.check_scales(self.layer, data[expert], expert)

    def _check_padding(self, layer: torch.nn.Module) -> None:
        for tensor in self.tensors:
            if not tensor.has_clean_padding(getattr(layer, tensor.parameter).data):
                raise ValueError(
                    f"{self.layer}: {tensor.parameter} of a sharded state has weights "
                    "where the padding of this rank should be: it was saved with "
                    "another VLLM_FP8_TP_PADDING or without this padding. Load it as "
                    "it was saved, or save it again from the original checkpoint."
                )

    def _check_complete(self, loaded: set[tuple[SlicedTensor, int | None]]) -> None:
        needed = [t for t in self.tensors if t.kind != "bias"]
        expected = [(tensor, e) for tensor in needed for e in self.experts]
        missing = [each for each in expected if each not in loaded]
        if not missing:
            return
        tensor, expert = missing[0]
        raise ValueError(
            f"{self.layer}: {tensor.parameter} of {tensor.label(expert)} is missing "
            f"from the checkpoint ({len(missing)} of {len(expected)} tensors are). "
            "Download or quantize the checkpoint again; every FP8 weight needs its "
            "block scales."
        )
