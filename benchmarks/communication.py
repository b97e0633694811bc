"""A model of the all-reduces that one rank alone does not do.

Published for eight H100s on NVLink, NCCL: 19 to 25 us up to 512 KB, 32 for 1 MB, 59
for 4, 91 for 8, 136 for 16 (ByteDance-Seed/Triton-distributed, issue 57), and 418 GB/s
of bus bandwidth for the largest. A latency and a bandwidth describe that to a third:
they say too little from 1 to 16 MB, which are 128 to 2048 tokens of 4096. vLLM's own
kernels for small messages take about half; all ways of one TP size add the same.
"""

LATENCY_US = 19.0
BYTES_PER_US = 200e3
PER_LAYER = 2  # After attention, and after the experts or the MLP.


def all_reduce_us(num_bytes: int) -> float:
    return LATENCY_US + num_bytes / BYTES_PER_US


def step_ms(tokens: int, hidden: int, layers: int) -> float:
    """Return milliseconds of a step's all-reduces of bfloat16 activations."""
    each = all_reduce_us(tokens * hidden * 2)
    return PER_LAYER * layers * each / 1e3
