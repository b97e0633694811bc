# SPDX-License-Identifier: Apache-2.0
"""Times GPU work by replaying CUDA graphs."""

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


def microseconds(
    graphs: Sequence[torch.cuda.CUDAGraph], replays: int = REPLAYS
) -> list[float]:
    """Return the median time of each graph; they take turns, so clocks are alike."""
    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(WARM_UP + replays):
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
