# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Launches kernels one after the other, in little time of the CPU from the second on.

Triton binds a kernel's arguments by name and looks a binary up by the types of all, for
each launch again: some 20 us of a CPU, where a prefill of a few thousand tokens leaves
no more for a layer's kernels. Layers of a model launch the same binaries with the same
constants. So the first call goes through Triton, which returns the binaries; later ones
only say where their tensors lie. They leave out what else Triton does for each launch:
refuse tensors that are not on a GPU, and compile anew for ``knobs`` that changed.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm.triton_utils import triton

from .workspace import Buffers, bytes_of, carve, offsets_of

# What Triton looks at in an address: binaries are for multiples of it, or for any.
ALIGNMENT = 16


@dataclass(frozen=True)
class Launch:
    """One launch, but for where tensors lie.

    Attributes:
        kernel: What ``triton.jit`` made.
        programs: Size of the grid.
        tensors: Names of the tensors that it points to, by the parameters
            ``{name}_ptr``.
        arguments: All other parameters, and Triton's options.
        described: Names of the tensors that TMA loads, by the parameters
            ``{name}_desc``, each with what makes a descriptor of one; launches that
            make the same are equal in it.
        persistent: Whether a multiprocessor has one program at a time, which goes on:
            ``programs`` are the most that have something to do.

    """

    kernel: Any
    programs: int
    tensors: Sequence[str]
    arguments: Mapping[str, Any]
    described: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    persistent: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        if not self.persistent:
            return self.programs, 1, 1
        return min(self.programs, _multiprocessors()), 1, 1

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return all parameters and options."""
        pointers = {f"{name}_ptr": tensors[name] for name in self.tensors}
        described = {
            f"{name}_desc": describe(tensors[name])
            for name, describe in self.described.items()
        }
        return {**pointers, **described, **self.arguments}

    def through_triton(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Launch, and return the binary; None where Triton interprets."""
        return self.kernel[self.grid](**self.with_tensors(tensors))

    def bound(self, binary: Any, tensors: Mapping[str, torch.Tensor]) -> "BoundLaunch":
        """Return the launch of a binary, for addresses in the order of ``tensors``."""
        parameters, names = self.kernel.arg_names, [*tensors]
        return BoundLaunch(
            binary[self.grid],
            [self.arguments.get(name) for name in parameters],
            [(parameters.index(f"{n}_ptr"), names.index(n)) for n in self.tensors],
            [
                (
                    parameters.index(f"{name}_desc"),
                    names.index(name),
                    describe,
                    tensors[name].dtype,
                )
                for name, describe in self.described.items()
            ],
        )


@dataclass(frozen=True)
class BoundLaunch:
    """A launch of one binary.

    Attributes:
        run: Takes all parameters in order, and the stream.
        values: Of the parameters; addresses are missing.
        places: Of each address: in ``values``, and among the tensors.
        described: Likewise of each descriptor, what makes it, and its tensor's dtype.

    """

    run: Callable[..., None]
    values: list[Any]
    places: list[tuple[int, int]]
    described: Sequence[tuple[int, int, Callable[[Any], Any], torch.dtype]] = ()

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        values = self.values.copy()
        for parameter, tensor in self.places:
            values[parameter] = addresses[tensor]
        for parameter, tensor, describe, dtype in self.described:
            values[parameter] = _described(describe, _At(addresses[tensor], dtype))
        self.run(*values, stream=stream)


@dataclass(frozen=True)
class _At:
    """What a descriptor is made of, in the place of a tensor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@functools.cache
def _described(describe: Callable[[Any], Any], at: _At) -> Any:
    """Return a descriptor, made once: weights stay where they are."""
    return describe(at)


class Launches:
    """The launches of one kind of call.

    Args:
        launches: In order.
        buffers: What they have in the workspace.

    """

    def __init__(self, launches: Sequence[Launch], buffers: Buffers):
        self.launches = launches
        self.buffers = buffers
        self.bytes = bytes_of(buffers)
        self._offsets = [*offsets_of(buffers).values()]
        self._bound: dict[Hashable, list[BoundLaunch]] = {}

    def run(self, tensors: Mapping[str, torch.Tensor], workspace: torch.Tensor) -> None:
        """Launch all.

        Args:
            tensors: By name, which each call gives in the same order.
            workspace: At least ``bytes`` bytes, in any state.

        Raises:
            ValueError: It is too small.

        """
        if workspace.nbytes < self.bytes:
            raise ValueError(
                f"The workspace of the masked kernels has {workspace.nbytes} bytes, "
                f"but this call needs {self.bytes}."
            )
        start = workspace.data_ptr()
        addresses = [tensor.data_ptr() for tensor in tensors.values()]
        addresses += [start + offset for offset in self._offsets]
        device = workspace.get_device()
        kind = device, *(tensor.dtype for tensor in tensors.values())
        # Other addresses are another binary, which Triton knows.
        bound = self._bound.get(kind) if _are_aligned(addresses) else None
        if bound is None:
            tensors = {**tensors, **carve(workspace, self.buffers)}
            binaries = [launch.through_triton(tensors) for launch in self.launches]
            if None not in binaries and _are_aligned(addresses):
                self._bind(kind, binaries, tensors)
            return
        stream = triton.runtime.driver.active.get_current_stream(device)
        for launch in bound:
            launch(addresses, stream)

    def _bind(
        self, kind: Hashable, binaries: list, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self._bound[kind] = [
            launch.bound(binary, tensors)
            for launch, binary in zip(self.launches, binaries, strict=True)
        ]


def _multiprocessors() -> int:
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(driver.get_current_device())
    return properties["multiprocessor_count"]


def _are_aligned(addresses: Sequence[int]) -> bool:
    bits = 0
    for address in addresses:
        bits |= address
    return bits % ALIGNMENT == 0
