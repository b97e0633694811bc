"""Times GPU work by replaying CUDA graphs."""

import math
from collections.abc import Callable

import torch

from vllm_patch.cli.tune.graph_timing import capture, microseconds

__all__ = ["capture", "captured", "launches", "microseconds", "replays_alike"]


def captured(call: Callable[[], torch.Tensor]) -> tuple[Callable, torch.Tensor]:
    """Return what replays a graph of ``call``, and the output that it writes."""
    outputs: list[torch.Tensor] = []
    graph = capture([lambda: outputs.append(call())])
    return graph.replay, outputs[-1]


def replays_alike(
    call: Callable[[], torch.Tensor], change: Callable[[int], None]
) -> bool:
    """Whether a graph of ``call``, replayed, writes what calls return, bit for bit.

    Args:
        call: No kernel of it adds in an order that varies from run to run.
        change: Sets the inputs, where they lie, to those of a seed.

    """
    replay, out = captured(call)
    for seed in range(2):
        change(seed)
        value = call().clone()
        change(seed)
        out.fill_(math.nan)
        replay()
        if not torch.equal(out, value):
            return False
    return True


def launches(call: Callable[[], object]) -> list[str]:
    """Return the names of what ``call`` puts on the GPU: kernels, copies, fills."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as trace:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [event.name for event in trace.events() if event.device_type == cuda]
