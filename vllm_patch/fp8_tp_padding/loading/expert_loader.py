# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loads routed experts: what vLLM calls, on top of ``SlicedTensors``."""

import functools
from types import MethodType

import torch

from .sliced_tensor import SlicedTensors


def fit(param: torch.nn.Parameter, tensors: SlicedTensors, name: str) -> None:
    """Give a parameter ``[experts, ...]`` the size that its slots need."""
    slots = [*tensors.of(name).values()]
    rows = sum(slot.windows[0].span for slot in slots)
    shape = [len(param), rows, *(w.span for w in slots[0].windows[1:])]
    if shape != list(param.shape):
        param.data = param.data.new_empty(shape)


def expert_loader(
    layer: torch.nn.Module, stock_loader: MethodType, tensors: SlicedTensors, name: str
) -> MethodType:
    """Return ``stock_loader``'s replacement for one parameter of sliced tensors.

    Args:
        layer: The ``RoutedExperts`` layer that owns the parameter.
        stock_loader: ``layer.weight_loader``; its signature and attributes
            (``supports_moe_loading``) are kept.
        tensors: The layer's.
        name: Name of the parameter.

    Returns:
        A bound method of ``layer``, as vLLM's weight reloading expects.

    """
    slots = tensors.of(name)

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
        if shard_id not in slots:
            tensors.refuse(
                f"{weight_name} came with shard_id = {shard_id!r}; {name} takes "
                f"{list(slots)}."
            )
        local_id = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local_id == -1:
            return False if return_success else None
        slot = slots[shard_id]
        values = {local_id: loaded_weight}
        if loaded_weight.ndim == len(slot.shape) + 1:
            if len(loaded_weight) != len(param):
                tensors.refuse(
                    f"the fused tensor for {name} holds {len(loaded_weight)} experts, "
                    f"but the layer has {len(param)}. Check the number of experts in "
                    "config.json against the checkpoint."
                )
            values = dict(enumerate(loaded_weight.unbind()))
        for expert, value in values.items():
            tensors.load(slot, param, value, weight_name, expert)
        return True if return_success else None

    return MethodType(weight_loader, layer)
