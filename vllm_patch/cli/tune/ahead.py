# SPDX-License-Identifier: Apache-2.0
"""Compiles the masked kernels without a GPU, in processes, for Triton's cache on disk.

Kernels are launched on tensors without memory. What Triton would compile is taken down
and compiled there; a process with a GPU that launches the same finds it on disk.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent import futures
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError

from vllm_patch.fp8_tp_padding.kernels import masked_moe
from vllm_patch.fp8_tp_padding.kernels.fp8_quant import FP8
from vllm_patch.fp8_tp_padding.kernels.tiles import Tiles

# Each takes up to half a GB.
MOST_PROCESSES = 16
Call = tuple[masked_moe.Problem, Tiles]


class Compilers:
    """Processes that compile; they must start before this one uses a GPU.

    Args:
        arch: Compute capability of the GPU, such as 90.

    """

    def __init__(self, arch: int):
        cores = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
        # Triton would launch a kernel that it compiled in the same process.
        self._notes, self._processes = (
            futures.ProcessPoolExecutor(
                number, multiprocessing.get_context("fork"), _start, (arch,)
            )
            for number in (1, cores)
        )
        self._compiled: set[str] = set()
        # Which starts them.
        for processes in self._notes, self._processes:
            processes.submit(int).result()

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_exception: object) -> None:
        for processes in self._notes, self._processes:
            processes.shutdown(cancel_futures=True)

    def compile(self, calls: Iterable[Call]) -> list[futures.Future]:
        """Start to compile what calls launch and nobody compiled here yet."""
        found = self._notes.submit(_launched, [*calls]).result()
        left = [what for what in found if what not in self._compiled]
        self._compiled |= {*left}
        return [self._processes.submit(_compile, what) for what in left]


def compile_for(arch: int) -> None:
    """Answer, in this process from now on, what Triton asks a driver."""
    driver = SimpleNamespace(
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    triton.runtime.driver.set_active(driver)


def launched(call: Callable[[], None]) -> list[str]:
    """Return what Triton would compile for ``call``; nothing is compiled or run."""
    found = []

    def note(compile, **_) -> bool:
        found.append(compile["specialization_data"])
        return True  # Triton takes it that somebody else compiles.

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note):
        call()
    return found


def launch(problem: masked_moe.Problem, tiles: Tiles) -> None:
    """Launch the kernels of a call on tensors without memory."""
    plan = masked_moe.plan_for(problem, tiles.fit(problem.hidden))
    x, codes, scale, ids = (
        torch.empty(1, dtype=dtype, device="meta")
        for dtype in (problem.dtype, FP8, torch.float32, torch.int32)
    )
    weights = masked_moe.Weights(codes, codes, scale, scale)
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device="meta")
    plan.run(x, x, weights, masked_moe.Routing(scale, ids), workspace)


def kernel_of(what: str) -> tuple[str, str]:
    """Return module and name of the kernel that something was taken down of."""
    module, _, name = json.loads(what)["name"].rpartition(".")
    return module, name


def binary(what: str) -> Any:
    """Compile what was taken down of a kernel that is imported here."""
    module, name = kernel_of(what)
    return vars(sys.modules[module])[name].preload(what)


def _start(arch: int) -> None:
    # What ends the first process ends these: it waits for what they have begun.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    compile_for(arch)


def _launched(calls: Iterable[Call]) -> list[str]:
    found = (launched(partial(launch, *call)) for call in calls)
    return [*dict.fromkeys(what for each in found for what in each)]


def _compile(what: str) -> None:
    # What cannot be compiled says so where it is launched.
    with suppress(TritonError):
        binary(what)
