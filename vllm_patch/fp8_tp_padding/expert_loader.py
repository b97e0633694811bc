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
from dataclasses import dataclass
from types import MethodType

import torch

from .shard import BlockShard

# (parameter name, local expert, shard id) of one tensor that was loaded.
LoadedTensor = tuple[str, int, str]


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

    def cut(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the padded slice of ``tensor``, ``span`` long in ``dim``."""
        real = tensor.narrow(dim, self.start, self.size)
        if self.size == self.span:
            return real
        pad = [0, 0] * (tensor.ndim - 1 - dim)
        pad += [self.lead, self.span - self.lead - self.size]
        return torch.nn.functional.pad(real, pad)


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter of the layer that holds padded slices of expert tensors.

    Attributes:
        name: Name of the parameter, of shape ``[experts, ...]``.
        shape: Shape of one expert's unsharded tensor in the checkpoint.
        dim: Its sharded dimension.
        window: The rank's part of that dimension.
        slots: Shard id -> index of its slot of ``window.span`` in ``dim``.
        is_scale: Whether it holds block scales.
        required: Whether a checkpoint must have it.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    window: Window
    slots: dict[str, int]
    is_scale: bool = False
    required: bool = True

    def load(self, expert_data: torch.Tensor, shard_id: str, tensor: torch.Tensor):
        """Fill ``shard_id``'s slot of one expert, padding included."""
        slot = expert_data.narrow(
            self.dim, self.slots[shard_id] * self.window.span, self.window.span
        )
        slot.copy_(self.window.cut(tensor, self.dim))

    def check(self, where: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        """Raise ValueError if ``tensor`` cannot be this checkpoint tensor."""
        if tuple(tensor.shape) != self.shape:
            raise ValueError(self._wrong_shape(where, tensor))
        if self.is_scale:
            _check_scales(where, tensor)
        elif tensor.dtype != dtype and self.name.endswith("_weight"):
            raise ValueError(
                f"{where} has dtype {tensor.dtype}, but a block-quantized FP8 "
                f"weight is {dtype}. List the layer in the checkpoint's "
                "modules_to_not_convert if it is not quantized."
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
        if self.is_scale:
            return (
                f"{message}, one scale for each quant block. Check "
                "weight_block_size and moe_intermediate_size in config.json "
                "against the checkpoint."
            )
        return (
            f"{message}. Check hidden_size and moe_intermediate_size in "
            "config.json against the checkpoint."
        )


def _check_scales(where: str, scales: torch.Tensor) -> None:
    values = scales.float()
    good = torch.isfinite(values) & (values > 0)
    if good.all():
        return
    block = tuple((~good).nonzero()[0].tolist())
    raise ValueError(
        f"{where} holds the scale {values[block].item()} for block {block}; a "
        "block scale must be finite and positive. The checkpoint is damaged or "
        "was quantized wrongly: download or quantize it again."
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
            parameter.check(where, tensor, param.dtype)
            parameter.load(param.data[expert], shard_id, tensor)
            # Reloading first counts elements with a dry run on the meta device.
            if not param.is_meta:
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


def check_complete(
    layer_name: str,
    num_experts: int,
    parameters: list[ExpertParameter],
    loaded: set[LoadedTensor],
) -> None:
    """Raise ValueError if a load left out a tensor that the layer needs.

    ``loaded`` is empty when weights came without the loaders (dummy weights,
    sharded state); there is nothing to check then.
    """
    if not loaded:
        return
    expected = [
        (parameter.name, expert_id, shard_id)
        for parameter in parameters
        if parameter.required
        for expert_id in range(num_experts)
        for shard_id in parameter.slots
    ]
    missing = [tensor for tensor in expected if tensor not in loaded]
    if not missing:
        return
    name, expert_id, shard_id = missing[0]
    raise ValueError(
        f"{layer_name}: {name} of expert {expert_id} ({shard_id}) is missing from "
        f"the checkpoint ({len(missing)} of {len(expected)} expert tensors are). "
        "Download or quantize the checkpoint again; every FP8 expert weight needs "
        "its block scales."
    )
