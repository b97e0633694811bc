"""Times GPU work by replaying CUDA graphs."""

import math
import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 40
WARM_UP = 5
# Keeps the GPU busy until the CPU has enqueued what is timed; about 0.1 ms.
HEAD_START_CYCLES = 200_000


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Return one graph of ``calls``, one after the other; each has run once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


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


def microseconds(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Return the median time of each graph; they take turns, so clocks are alike."""
    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(WARM_UP + REPLAYS):
        for graph, samples in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START_CYCLES)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= WARM_UP:
                samples.append(1000 * start.elapsed_time(end))
    return [statistics.median(samples) for samples in times]


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
