"""A model of the all-reduces that one rank alone does not do.

Published for eight H100s on NVLink, NCCL: 19 to 25 us up to 512 KB, 32 for 1 MB, 59
for 4, 91 for 8, 136 for 16 (ByteDance-Seed/Triton-distributed, issue 57), and 418 GB/s
of bus bandwidth for the largest. A latency and a bandwidth describe that to a third:
they say too little from 1 to 16 MB, which are 128 to 2048 tokens of 4096. vLLM's own
kernels for small messages take about half; all ways of one TP size add the same.

``python -m benchmarks.communication ONE EIGHT`` prints how far it was off: rows of
``benchmarks.engine`` of one rank alone, with what the model adds, and those of all.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator

from benchmarks.plot_moe import read

# What makes two rows one, with how tokens get their experts.
KEYS = "model", "layers", "mode", "way", "tp_size", "measure", "tokens", "context"
SIMULATED = "simulated"
HEAD = "one rank", "with model", "real", "off", "us each"

LATENCY_US = 19.0
BYTES_PER_US = 200e3
PER_LAYER = 2  # After attention, and after the experts or the MLP.


def all_reduce_us(num_bytes: int) -> float:
    return LATENCY_US + num_bytes / BYTES_PER_US


def step_ms(tokens: int, hidden: int, layers: int) -> float:
    """Return milliseconds of a step's all-reduces of bfloat16 activations."""
    each = all_reduce_us(tokens * hidden * 2)
    return PER_LAYER * layers * each / 1e3


def compared(
    alone: list[dict[str, str]], real: list[dict[str, str]]
) -> Iterator[tuple[tuple[str, ...], tuple[float, ...]]]:
    """Yield the key of each step that both have, and its columns.

    They are milliseconds of one rank, with the model, and of all; the model's share of
    the latter less 1; microseconds of an all-reduce that would have made it exact.
    """
    found = {_key(row): row for row in real}
    for row in alone:
        key = _key(row)
        if row["communication_ms"] and key in found:
            rank, total = float(row["value"]), float(found[key]["value"])
            modelled = rank + float(row["communication_ms"])
            each = 1e3 * (total - rank) / (PER_LAYER * int(row["layers"]))
            yield key, (rank, modelled, total, modelled / total - 1, each)


def routing_in(row: dict[str, str]) -> str:
    """Return a row's routing: those that do not say it are of vLLM's simulation."""
    return row.get("routing", SIMULATED)


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return *(row[key] for key in KEYS), routing_in(row)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("one", help="file of benchmarks.engine")
    parser.add_argument("eight", help="file of benchmarks.engine --gpus 8")
    args = parser.parse_args(argv)
    ratios = defaultdict(list)
    print(f"{'':48}" + "".join(f"{name:>11}" for name in HEAD))
    for key, (*times, off, each) in compared(read(args.one), read(args.eight)):
        model, _, mode, way, _, measure, *_ = key
        ratios[model, mode, way, measure].append(1 + off)
        cells = "".join(f"{value:11.4g}" for value in times)
        where = " ".join(filter(None, key[2:4] + key[5:-1]))
        print(f"{where:48}{cells}{off:11.1%}{each:11.1f}")
    if not ratios:
        parser.error(
            "the files have no step in common: same --modes, --layers and routing?"
        )
    for key, values in ratios.items():
        mean = statistics.geometric_mean(values) - 1
        worst = max(values, key=lambda value: abs(value - 1)) - 1
        print(f"{', '.join(key)}: {mean:+.1%}, at most {worst:+.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
