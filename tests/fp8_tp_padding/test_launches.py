# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Calls after the first launch Triton's binaries themselves."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels import (
    launches,
    masked_moe,
)

from .experts import Checkpoint
from .tensor_parallel import runs_kernels
from .test_masked_moe import HIDDEN, PATHS, TOP_K, compact_layer, tokens

pytestmark = runs_kernels

# The stream of a device.
STREAMS = {-1: 7, 0: 8, 1: 9}


class Compiled:
    """An interpreted kernel that is launched as Triton launches compiled ones.

    Args:
        kernel: What ``triton.jit`` makes for its interpreter.
        notes: Where each launch says which way it came.

    """

    def __init__(self, kernel, notes: list[str]):
        self.kernel, self.notes = kernel, notes
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def launch(**arguments):
            self.notes.append("Triton")
            self.kernel[grid](**arguments)
            return Binary(self, arguments)

        return launch


class Binary:
    """What Triton returns: it takes all parameters in order, and addresses."""

    def __init__(self, compiled: Compiled, arguments: dict):
        self.compiled = compiled
        options = {k: v for k, v in arguments.items() if k not in compiled.arg_names}
        self.options = options
        self.dtypes = {
            name: (value.dtype, value.nbytes)
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor)
        }

    def __getitem__(self, grid):
        assert len(grid) == 3, "as CompiledKernel wants it"

        def launch(*values, stream):
            assert stream in STREAMS.values()
            named = dict(zip(self.compiled.arg_names, values, strict=True))
            for name, of in self.dtypes.items():
                named[name] = tensor_at(named[name], *of)
            self.compiled.notes.append("bound")
            self.compiled.kernel[grid](**named, **self.options)

        return launch


def tensor_at(address: int, dtype: torch.dtype, nbytes: int) -> torch.Tensor:
    memory = (ctypes.c_char * nbytes).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)


@pytest.fixture
def notes(monkeypatch):
    """Which way each launch came, with kernels that compile."""
    found: list[str] = []
    for name, kernel in vars(masked_moe).copy().items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(masked_moe, name, Compiled(kernel, found))
    driver = SimpleNamespace(get_current_stream=STREAMS.get)
    active = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace()))
    active.runtime.driver.active = driver
    monkeypatch.setattr(launches, "triton", active)
    return found


class Call:
    """A plan and the tensors of a call of it, in memory of its own."""

    def __init__(self, path: str, count: int):
        checkpoint = Checkpoint.exact(384, experts=4, hidden=HIDDEN)
        self.layer = compact_layer(384, 2, 1, checkpoint)
        shard = self.layer.quant_method.block_shard
        problem = masked_moe.Problem(count, TOP_K, HIDDEN, 4, shard, torch.float32)
        self.plan = masked_moe.plan_for(problem, PATHS[path])

    def __call__(self, count: int, reverse: bool = False, ids=torch.int32, shift=0):
        """Return the output for inputs, in their order or the reverse, where asked."""
        x, weights, routed = (t.flip(0) if reverse else t for t in tokens(count))
        raw = torch.empty(x.numel() + shift)
        x = raw[shift:].view_as(x).copy_(x)
        out = torch.full_like(x, float("nan"))
        workspace = torch.full((self.plan.workspace_bytes,), 0xFF, dtype=torch.uint8)
        layer = self.layer
        experts = masked_moe.Weights(
            *(layer.w13_weight, layer.w2_weight),
            *(layer.w13_weight_scale_inv, layer.w2_weight_scale_inv),
        )
        routing = masked_moe.Routing(weights, routed.to(ids))
        self.plan.run(out, x, experts, routing, workspace)
        return out


@pytest.mark.parametrize("path", PATHS)
def test_a_later_call_computes_the_same(notes, path):
    """Tensors lie elsewhere, and hold other values."""
    call = Call(path, count=2)
    first = call(2)
    launched = len(notes)
    assert notes == ["Triton"] * launched
    kept = call(2)  # Keeps the first's memory from being used again.
    assert torch.equal(call(2, reverse=True).flip(0), first)
    assert torch.equal(kept, first)
    assert notes[launched:] == 2 * launched * ["bound"]


def test_what_other_binaries_are_for_goes_through_triton(notes):
    """Other dtypes and addresses that are no multiple of 16 bytes."""
    call = Call("pairs", count=1)
    first = call(1)
    for other in ({"ids": torch.int64}, {"shift": 1}):
        notes.clear()
        assert torch.equal(call(1, **other), first)
        assert notes == 3 * ["Triton"]
    notes.clear()
    assert torch.equal(call(1, ids=torch.int64), first)
    assert notes == 3 * ["bound"]
    notes.clear()
    call(1, shift=1)
    assert notes == 3 * ["Triton"], "no binary for any address is kept"


def test_an_odd_first_call_binds_nothing(notes):
    call = Call("pairs", count=1)
    call(1, shift=1)
    notes.clear()
    call(1)
    assert notes == 3 * ["Triton"]


def test_a_workspace_that_is_too_small_is_named():
    plan = Call("pairs", count=3).plan
    workspace = torch.empty(plan.workspace_bytes - 1, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=rf"{len(workspace)} bytes, but this call need"
    ):
        plan._prepared.run({}, workspace)


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    index = 0

    def get_device(self) -> int:
        return self.index


class Noted:
    """A kernel, and its binary, that notes on which stream it is launched directly."""

    arg_names = ("x_ptr",)

    def __init__(self):
        self.streams = []

    def __getitem__(self, grid):
        # Triton's launch takes parameters by name, and no stream.
        return lambda *address, stream=None, **named: self.run(stream)

    def run(self, stream):
        self.streams += [] if stream is None else [stream]
        return self


@pytest.mark.parametrize("device", [0, 1])
def test_binaries_and_streams_are_of_a_device(notes, device):
    kernel = Noted()
    prepared = launches.Launches([launches.Launch(kernel, 1, ["x"], {})], {})
    x = torch.zeros(4)
    workspace = torch.empty(16, dtype=torch.uint8).as_subclass(OnDevice)
    for index in (1 - device, device):
        workspace.index = index
        prepared.run({"x": x}, workspace)
        assert kernel.streams == [], "a binary of another device is not launched"
    prepared.run({"x": x}, workspace)
    assert kernel.streams == [STREAMS[device]]


def test_a_launch_within_a_launch_has_addresses_of_its_own():
    """As when two batches take turns in two threads."""
    ran = []
    bound = launches.BoundLaunch(
        lambda *values, stream: ran.append(values), [None, None], [(0, 0), (1, 1)]
    )

    class Interrupted(list):
        def __getitem__(self, index):
            if index == 1:
                bound([30, 40], stream=0)
            return super().__getitem__(index)

    bound(Interrupted([10, 20]), stream=0)
    assert ran == [(30, 40), (10, 20)]


def test_tritons_binaries_are_launched_as_we_do():
    """By its own ``CompiledKernel``, without a GPU to load one on."""
    from triton.compiler import CompiledKernel

    ran = []
    binary = object.__new__(CompiledKernel)
    binary.module, binary.function, binary.packed_metadata = object(), 11, (4, 1, 0)
    binary.src, binary.name = None, "kernel"
    binary._run = lambda *args: ran.append(args)
    launch = launches.Launch(
        SimpleNamespace(arg_names=["N", "x_ptr"]), 5, ["x"], {"N": 3}
    )
    launch.bound(binary, dict.fromkeys(["y", "x"]))([100, 200], stream=7)
    ((*grid_and_stream, function, _, _, _, _, n, address),) = ran
    assert grid_and_stream == [5, 1, 1, 7]
    assert (function, n, address) == (11, 3, 200)
