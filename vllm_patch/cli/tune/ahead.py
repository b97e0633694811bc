# SPDX-License-Identifier: Apache-2.0
"""Compiles the masked kernels without a GPU, in processes, for Triton's cache on disk.

A process with a GPU that launches the same finds it there. (Of what Triton preloads by
its own notes it does not: to its cache that is something else.)
"""

import multiprocessing
import os
import signal
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
        # In Triton 3.7 a kernel's key depends on whose keys were asked for before, and
        # what is forked from here knows all.
        for value in vars(masked_moe).values():
            if isinstance(value, triton.JITFunction):
                _ = value.cache_key
        self._processes = futures.ProcessPoolExecutor(
            min(MOST_PROCESSES, len(os.sched_getaffinity(0))),
            multiprocessing.get_context("fork"),
            _start,
            (arch,),
        )
        self._compiled: set[str] = set()
        # Which starts them.
        self._processes.submit(int).result()

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._processes.shutdown(cancel_futures=True)

    def compile(self, calls: Iterable[Call]) -> list[futures.Future]:
        """Start to compile what calls launch and nobody compiled here yet."""
        found = self._processes.submit(_noted, [*calls]).result()
        left = found.keys() - self._compiled
        self._compiled |= left
        return [self._processes.submit(_compile, *found[what]) for what in left]


def compile_for(arch: int) -> None:
    """Answer, in this process from now on, what Triton asks a driver."""
    driver = SimpleNamespace(
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    triton.runtime.driver.set_active(driver)


def launched(call: Callable[[], object]) -> list[str]:
    """Return what Triton would compile for ``call``; nothing is compiled or run."""
    found = []

    def note(compile, **_) -> bool:
        found.append(compile["specialization_data"])
        return True  # Triton takes it that somebody else compiles.

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note):
        call()
    return found


def kernels(problem: masked_moe.Problem, tiles: Tiles) -> list[Callable[[], Any]]:
    """Return what compiles each kernel of a call; each returns its binary."""
    plan = masked_moe.plan_for(problem, tiles.fit(problem.hidden))
    dtypes = {name: dtype for name, (_, dtype) in plan.buffers().items()}
    dtypes |= dict.fromkeys(("x", "out"), problem.dtype)
    dtypes |= dict.fromkeys(("w13", "w2"), FP8)
    dtypes |= dict.fromkeys(("w13_scale", "w2_scale", "topk_weights"), torch.float32)
    dtypes["topk_ids"] = torch.int32
    tensors = {n: torch.empty(1, dtype=t, device="meta") for n, t in dtypes.items()}
    return [
        partial(
            launch.kernel.warmup,
            grid=(launch.programs,),
            **launch.with_tensors(tensors),
        )
        for launch in plan.launches()
    ]


def _start(arch: int) -> None:
    # What ends the first process ends these: it waits for what they have begun.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    compile_for(arch)


def _noted(calls: Iterable[Call]) -> dict[str, tuple]:
    """Return what calls would compile, each with where it was first met."""
    found = {}
    for call in calls:
        for index, kernel in enumerate(kernels(*call)):
            for what in launched(kernel):
                found.setdefault(what, (*call, index))
    return found


def _compile(problem: masked_moe.Problem, tiles: Tiles, index: int) -> None:
    # What cannot be compiled says so where it is launched.
    with suppress(TritonError):
        kernels(problem, tiles)[index]()
