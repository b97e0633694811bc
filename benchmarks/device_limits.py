"""What this GPU can do at best: copy bandwidth and FP8 matrix products."""

from dataclasses import dataclass

import torch

COPY_BYTES = 4 << 30
MATRIX = 8192
RUNS = 10


@dataclass(frozen=True)
class Limits:
    """Measured limits of a device.

    Attributes:
        bandwidth: Bytes per second that a copy reads and writes, together.
        fp8_flops: FP8 multiplications and additions per second.
        l2_bytes: Size of the L2 cache.

    """

    bandwidth: float
    fp8_flops: float
    l2_bytes: int

    @classmethod
    def measured(cls, device: torch.device) -> "Limits":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        return cls(_bandwidth(device), _fp8_flops(device), l2_bytes)

    def floor_us(self, num_bytes: float, flops: float) -> float:
        """Return the least time for that much traffic and arithmetic, in us."""
        return 1e6 * max(num_bytes / self.bandwidth, flops / self.fp8_flops)


def _bandwidth(device: torch.device) -> float:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Not in a CUDA graph: its copy nodes are a third slower than a copy kernel.
    return 2 * COPY_BYTES / _seconds(lambda: target.copy_(source))


def _fp8_flops(device: torch.device) -> float:
    a, b = (
        torch.randn(MATRIX, MATRIX, device=device).to(torch.float8_e4m3fn)
        for _ in range(2)
    )
    one = torch.ones((), device=device, dtype=torch.float32)
    kwargs = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
    return 2 * MATRIX**3 / _seconds(lambda: torch._scaled_mm(a, b.t(), **kwargs))


def _seconds(call) -> float:
    """Return the best time of one call."""
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times)
