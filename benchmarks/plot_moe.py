"""Draws the rows of ``python -m benchmarks.moe --csv FILE``.

``python -m benchmarks.plot_moe FILE... OUT.png`` (or ``.svg``) draws one panel for
each case: how many times the hardware's floor each implementation takes, by number
of tokens. Lower is better; 1 is what the memory or the tensor cores allow.
"""

import argparse
import csv
import math
import sys
from collections import defaultdict

LABELS = {
    "ours": "masked, real columns only",
    "padded": "stock on padded blocks",
    "refined": "stock on refined blocks",
    "half_tp": "stock at half the TP size",
    "ep": "expert parallel, worst rank",
}
# Told apart without colour too: Okabe and Ito's colours, and markers.
STYLES = {
    "ours": {"color": "#000000", "marker": "o", "linewidth": 2.5},
    "padded": {"color": "#D55E00", "marker": "s"},
    "refined": {"color": "#0072B2", "marker": "^"},
    "half_tp": {"color": "#009E73", "marker": "v", "linestyle": "--"},
    "ep": {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
}
PER_ROW = 2
# Case -> implementation -> (tokens, us, floor in us).
Series = dict[str, dict[str, list[tuple[int, float, float]]]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot_moe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("csv", nargs="+", help="files of benchmarks.moe")
    parser.add_argument("out", help="image; its ending says which kind")
    args = parser.parse_args(argv)
    rows = [row for path in args.csv for row in _read(path)]
    if not rows:
        parser.error(f"no rows in {', '.join(args.csv)}: run benchmarks.moe --csv")
    where = {(row["gpu"], row["vllm"]) for row in rows}
    if len(where) > 1:
        parser.error(f"rows of {sorted(where)} belong in separate images")
    _draw(_series(rows), rows[0], args.out)
    return 0


def _read(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _series(rows: list[dict[str, str]]) -> Series:
    series: Series = defaultdict(lambda: defaultdict(list))
    for row in rows:
        point = int(row["tokens"]), float(row["us"]), float(row["floor_us"])
        series[_title(row)][row["implementation"]].append(point)
    return series


def _title(row: dict[str, str]) -> str:
    return f"{row['case']}: {row['columns']} of {row['total']} columns"


def _draw(series: Series, common: dict[str, str], out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(PER_ROW, len(series))
    down = math.ceil(len(series) / across)
    figure, panels = pyplot.subplots(
        down, across, figsize=(5.2 * across, 3.6 * down + 0.8), squeeze=False
    )
    for panel in panels.flat[len(series) :]:
        panel.remove()
    for panel, (title, lines) in zip(panels.flat, series.items(), strict=False):
        _draw_case(panel, title, lines)
    # Most cases lack a column; the legend names each that some case has.
    drawn = {
        line.get_label(): line for panel in panels.flat for line in panel.get_lines()
    }
    named = [text for text in LABELS.values() if text in drawn]
    figure.legend([drawn[text] for text in named], named, loc="lower center", ncols=3)
    figure.suptitle(
        f"Block-FP8 experts of one rank on {common['gpu']}, vLLM {common['vllm']}: "
        "time over the hardware's floor"
    )
    figure.tight_layout(rect=(0, 0.4 / (3.6 * down + 0.8) + 0.02, 1, 1))
    figure.savefig(out, dpi=150)


def _draw_case(panel, title: str, lines: dict[str, list]) -> None:
    for name, label in LABELS.items():
        points = sorted(lines.get(name, []))
        if points:
            tokens, us, floor = zip(*points, strict=True)
            over = [a / b for a, b in zip(us, floor, strict=True)]
            panel.plot(tokens, over, label=label, markersize=5, **STYLES[name])
    panel.axhline(1, color="grey", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks([t for t, *_ in sorted(lines["ours"])] if "ours" in lines else [])
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.yaxis.set_major_formatter("{x:g}x")
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("tokens")
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
