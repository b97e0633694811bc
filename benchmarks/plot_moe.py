"""Draws the rows of ``python -m benchmarks.moe --csv FILE``.

``python -m benchmarks.plot_moe FILE... OUT.svg`` draws one panel for each case: how
many times the hardware's floor each implementation takes, by number of tokens. Lower
is better; 1 is what the memory or the tensor cores allow.
"""

import argparse
import csv
import math
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.panels import Panel, Style, drawing

STYLES = {
    "ours": Style("masked, real columns only", "#000", "none", "M0-3a3 3 0 1 0 .1 0z"),
    "padded": Style("stock on padded blocks", "#D55E00", "none", "M-3-3h6v6h-6z"),
    "refined": Style("stock on refined blocks", "#0072B2", "none", "M-3.5 3h7l-3.5-6z"),
    "half_tp": Style(
        "stock at half the TP size", "#009E73", "6 3", "M-3.5-3h7l-3.5 6z"
    ),
    "ep": Style("expert parallel, worst rank", "#CC79A7", "2 2", "M-4 0l4-4l4 4l-4 4z"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="+", help="files of benchmarks.moe")
    parser.add_argument("out", help="file of the image, an SVG")
    args = parser.parse_args(argv)
    rows = [row for path in args.csv for row in read(path)]
    if not rows:
        parser.error(f"no rows in {', '.join(args.csv)}: run benchmarks.moe --csv")
    where = {(row["gpu"], row["vllm"]) for row in rows}
    if len(where) > 1:
        parser.error(f"rows of {sorted(where)} belong in separate images")
    Path(args.out).write_text(image(rows))
    return 0


def read(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def image(rows: list[dict[str, str]]) -> str:
    """Return an SVG of rows that were measured in one place."""
    panels: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        title = f"{row['case']}: {row['columns']} of {row['total']} columns"
        point = int(row["tokens"]), _over(row)
        panels[title][row["implementation"]].append(point)
    title = (
        f"Block-FP8 experts of one rank on {rows[0]['gpu']}, vLLM {rows[0]['vllm']}: "
        "time over the hardware's floor, by tokens"
    )
    doublings = max(1, math.ceil(math.log2(max(map(_over, rows)))))
    ticks = [2**doubling for doubling in range(doublings + 1)]
    drawn = [Panel(*each) for each in panels.items()]
    return drawing(title, drawn, STYLES, ticks)


def _over(row: dict[str, str]) -> float:
    return float(row["us"]) / float(row["floor_us"])


if __name__ == "__main__":
    sys.exit(main())
