# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loads a checkpoint's expert tensors into parameters padded to whole blocks.

vLLM's own loader splits a scale's rows by ``rows // tp_size``, which drops or
shifts scales when a rank starts inside a block. Here every slice is cut out of
the full tensor by the rank's ``BlockShard``. Each load writes the whole padded
slot, zeros included, so no byte of uninitialised or stale memory survives a
load or a reload.
"""

import functools
import itertools
from dataclasses import dataclass
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

# (parameter name, local expert, shard id) of one tensor that was loaded.
LoadedTensor = tuple[str, int, str]


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter of the layer that holds padded slices of expert tensors.

    Attributes:
        name: Name of the parameter, of shape ``[experts, ...]``.
        kind: What it holds. A checkpoint must have weights and scales; biases
            start at zero.
        shape: Shape of one expert's unsharded tensor in the checkpoint.
        dim: Its sharded dimension.
        window: The rank's part of that dimension.
        slots: Shard id -> index of its slot of ``window.span`` in ``dim``.

    """

    name: str
    kind: Literal["weight", "scale", "bias"]
    shape: tuple[int, ...]
    dim: int
    window: Window
    slots: dict[str, int]

    def fit(self, param: torch.nn.Parameter) -> None:
        """Give ``param`` the size that its slots need."""
        shape = list(param.shape)
        shape[self.dim + 1] = self.window.span * (max(self.slots.values()) + 1)
        if shape != list(param.shape):
            param.data = param.data.new_empty(shape)

    def slot(self, expert_data: torch.Tensor, shard_id: str) -> torch.Tensor:
        """Return the view of one expert's parameter that ``shard_id`` fills."""
        span = self.window.span
        return expert_data.narrow(self.dim, self.slots[shard_id] * span, span)

    def load(
        self, expert_data: torch.Tensor, shard_id: str, tensor: torch.Tensor
    ) -> None:
        """Fill ``shard_id``'s slot of one expert, padding included."""
        self.slot(expert_data, shard_id).copy_(self.window.cut(tensor, self.dim))

    def check(self, where: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        """Raise ValueError if ``tensor`` cannot be this checkpoint tensor."""
        if tuple(tensor.shape) != self.shape:
            raise ValueError(self._wrong_shape(where, tensor))
        if self.kind == "weight":
            check_weight_dtype(where, tensor, dtype)

    def check_scales(self, layer_name: str, param: torch.Tensor) -> None:
        """Raise ValueError if a loaded block scale is not finite and positive."""
        if first_bad_scale(param) is None:
            return
        for expert, shard_id in itertools.product(range(len(param)), self.slots):
            found = first_bad_scale(self.slot(param[expert], shard_id))
            if found is None:
                continue
            block, value = found
            block[self.dim] += self.window.start
            raise ValueError(
                f"{layer_name}: {self.name} of expert {expert} ({shard_id}) holds the "
                f"scale {value} for block {tuple(block)} of the checkpoint; {REMEDY}"
            )

    def _wrong_shape(self, where: str, tensor: torch.Tensor) -> str:
        found = tuple(tensor.shape)
        message = f"{where} has shape {found}, but the model needs {self.shape}"
        if tensor.ndim == len(self.shape) and found[self.dim] in (
            self.window.size,
            self.window.span,
        ):
            return (
                f"{message}: it looks already split for tensor parallelism "
                f"({found[self.dim]} of {self.window.total} in dimension "
                f"{self.dim}). Load the unsharded checkpoint."
            )
        if self.kind == "scale":
            return (
                f"{message}, one scale for each quant block. Check "
                "weight_block_size and moe_intermediate_size in config.json "
                "against the checkpoint."
            )
        return (
            f"{message}. Check hidden_size and moe_intermediate_size in "
            "config.json against the checkpoint."
        )


def padded_weight_loader(
    layer: torch.nn.Module,
    stock_loader: MethodType,
    parameter: ExpertParameter,
    loaded: set[LoadedTensor],
) -> MethodType:
    """Return ``stock_loader``'s replacement for one padded parameter.

    Args:
        layer: The ``RoutedExperts`` layer that owns the parameter.
        stock_loader: ``layer.weight_loader``; its signature and attributes
            (``supports_moe_loading``) are kept.
        parameter: What the parameter holds.
        loaded: Gets an entry for every tensor loaded.

    Returns:
        A bound method of ``layer``, as vLLM's weight reloading expects.

    """

    # The function, not the method: reloading binds arguments by its signature.
    @functools.wraps(stock_loader.__func__)
    def weight_loader(
        layer,
        param,
        loaded_weight,
        weight_name,
        shard_id,
        expert_id,
        return_success=False,
    ):
        if shard_id not in parameter.slots:
            raise ValueError(
                f"{layer.layer_name}: {weight_name} came with shard_id = "
                f"{shard_id!r}; {parameter.name} takes {list(parameter.slots)}."
            )
        local_id = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local_id == -1:
            return False if return_success else None
        experts = _split_experts(layer, param, parameter, loaded_weight, local_id)
        for expert, tensor in experts.items():
            where = f"{layer.layer_name}: {weight_name} of expert {expert} ({shard_id})"
            with forgotten_on_error(loaded):
                parameter.check(where, tensor, param.dtype)
            parameter.load(param.data[expert], shard_id, tensor)
            loaded.add((parameter.name, expert, shard_id))
        return True if return_success else None

    return MethodType(weight_loader, layer)


def _split_experts(
    layer: torch.nn.Module,
    param: torch.Tensor,
    parameter: ExpertParameter,
    loaded_weight: torch.Tensor,
    local_id: int,
) -> dict[int, torch.Tensor]:
    """Return the tensors by local expert, of one expert or of a fused tensor."""
    if loaded_weight.ndim != len(parameter.shape) + 1:
        return {local_id: loaded_weight}
    if loaded_weight.shape[0] != param.shape[0]:
        raise ValueError(
            f"{layer.layer_name}: the fused tensor for {parameter.name} holds "
            f"{loaded_weight.shape[0]} experts, but the layer has {param.shape[0]}. "
            "Check the number of experts in config.json against the checkpoint."
        )
    return dict(enumerate(loaded_weight.unbind()))


def check_loaded(
    layer: torch.nn.Module,
    parameters: list[ExpertParameter],
    loaded: set[LoadedTensor],
) -> None:
    """Raise ValueError if a load left out a tensor or brought an impossible scale.

    ``loaded`` is empty when weights came without the loaders (dummy weights,
    sharded state); there is nothing to check then.
    """
    if not loaded:
        return
    _check_complete(layer, parameters, loaded)
    for parameter in parameters:
        if parameter.kind == "scale":
            param = getattr(layer, parameter.name).data
            parameter.check_scales(layer.layer_name, param)


def _check_complete(
    layer: torch.nn.Module,
    parameters: list[ExpertParameter],
    loaded: set[LoadedTensor],
) -> None:
    expected = [
        (parameter.name, expert_id, shard_id)
        for parameter in parameters
        if parameter.kind != "bias"
        for expert_id in range(layer.local_num_experts)
        for shard_id in parameter.slots
    ]
    missing = [tensor for tensor in expected if tensor not in loaded]
    if not missing:
        return
    name, expert_id, shard_id = missing[0]
    raise ValueError(
        f"{layer.layer_name}: {name} of expert {expert_id} ({shard_id}) is missing "
        f"from the checkpoint ({len(missing)} of {len(expected)} expert tensors are). "
        "Download or quantize the checkpoint again; every FP8 expert weight needs "
        "its block scales."
    )
