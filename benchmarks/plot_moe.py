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

# Name -> what it is, colour (Okabe and Ito's), dashes and marker.
STYLES = {
    "ours": ("masked, real columns only", "#000", "none", "M0-3a3 3 0 1 0 .1 0z"),
    "padded": ("stock on padded blocks", "#D55E00", "none", "M-3-3h6v6h-6z"),
    "refined": ("stock on refined blocks", "#0072B2", "none", "M-3.5 3h7l-3.5-6z"),
    "half_tp": ("stock at half the TP size", "#009E73", "6 3", "M-3.5-3h7l-3.5 6z"),
    "ep": ("expert parallel, worst rank", "#CC79A7", "2 2", "M-4 0l4-4l4 4l-4 4z"),
}
PER_ROW = 2
# In pixels: a panel, the plot in it, and what is above all panels.
PANEL, PLOT, TOP = (380, 250), (330, 190), 62
CSS = """
text { font: 11px sans-serif; text-anchor: middle }
.title { font-size: 13px }
.y { text-anchor: end }
.legend { text-anchor: start }
.grid { stroke: #ddd }
.line { fill: none; stroke-width: 1.6 }
"""
# Tokens and time over the floor.
Line = list[tuple[int, float]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="+", help="files of benchmarks.moe")
    parser.add_argument("out", help="file of the image, an SVG")
    args = parser.parse_args(argv)
    rows = [row for path in args.csv for row in _read(path)]
    if not rows:
        parser.error(f"no rows in {', '.join(args.csv)}: run benchmarks.moe --csv")
    where = {(row["gpu"], row["vllm"]) for row in rows}
    if len(where) > 1:
        parser.error(f"rows of {sorted(where)} belong in separate images")
    Path(args.out).write_text(drawing(rows))
    return 0


def _read(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _panels(rows: list[dict[str, str]]) -> dict[str, dict[str, Line]]:
    """Return lines by case and implementation."""
    panels: dict[str, dict[str, Line]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        title = f"{row['case']}: {row['columns']} of {row['total']} columns"
        over = float(row["us"]) / float(row["floor_us"])
        panels[title][row["implementation"]].append((int(row["tokens"]), over))
    return panels


def drawing(rows: list[dict[str, str]]) -> str:
    """Return an SVG of rows that were measured in one place."""
    panels, axes = _panels(rows), _Axes(rows)
    width = PER_ROW * PANEL[0]
    height = TOP + math.ceil(len(panels) / PER_ROW) * PANEL[1]
    title = (
        f"Block-FP8 experts of one rank on {rows[0]['gpu']}, vLLM {rows[0]['vllm']}: "
        "time over the hardware's floor, by tokens"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        f"<style>{CSS}{''.join(map(_style, STYLES))}</style>",
        *("<defs>", *map(_marker, STYLES), *axes.grid(), "</defs>"),
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text class="title" x="{width // 2}" y="18">{title}</text>',
        *_legend({name for panel in panels.values() for name in panel}),
    ]
    for index, (title, panel) in enumerate(panels.items()):
        x, y = index % PER_ROW * PANEL[0] + 40, index // PER_ROW * PANEL[1] + TOP + 20
        lines += [f'<g transform="translate({x} {y})">', axes.panel(title, panel)]
    return "\n".join([*lines, "</svg>", ""])


def _style(name: str) -> str:
    _, color, dashes, _ = STYLES[name]
    return (
        f".{name} {{ stroke: {color}; stroke-dasharray: {dashes}; "
        f"marker: url(#{name}) }}\n"
    )


def _marker(name: str) -> str:
    _, color, _, path = STYLES[name]
    return (
        f'<marker id="{name}" viewBox="-5 -5 10 10" markerWidth="10" markerHeight="10" '
        f'markerUnits="userSpaceOnUse"><path fill="{color}" d="{path}"/></marker>'
    )


def _legend(names: set[str]) -> list[str]:
    """Name each implementation that some case has."""
    lines, each = [], PER_ROW * PANEL[0] // 3
    for index, name in enumerate(name for name in STYLES if name in names):
        x, y = index % 3 * each + 20, index // 3 * 16 + 36
        lines += [
            f'<path class="line {name}" d="M{x} {y}h20h20"/>',
            f'<text class="legend" x="{x + 48}" y="{y + 4}">{STYLES[name][0]}</text>',
        ]
    return lines


class _Axes:
    """Both logarithmic, and the same in all panels."""

    def __init__(self, rows: list[dict[str, str]]):
        self.tokens = sorted({int(row["tokens"]) for row in rows})
        highest = max(float(row["us"]) / float(row["floor_us"]) for row in rows)
        self.doublings = max(1, math.ceil(math.log2(highest)))

    def x(self, tokens: int) -> float:
        first, last = math.log2(self.tokens[0]), math.log2(self.tokens[-1])
        share = (math.log2(tokens) - first) / max(1, last - first)
        return round(10 + share * (PLOT[0] - 20), 1)

    def y(self, over: float) -> float:
        return round(PLOT[1] * (1 - math.log2(over) / self.doublings), 1)

    def grid(self) -> list[str]:
        lines, (width, height) = ['<g id="axes">'], PLOT
        for x, tokens in ((self.x(tokens), tokens) for tokens in self.tokens):
            lines.append(f'<path class="grid" d="M{x} 0v{height}"/>')
            lines.append(f'<text x="{x}" y="{height + 14}">{tokens}</text>')
        for over in (2**doubling for doubling in range(self.doublings + 1)):
            y = self.y(over)
            lines.append(f'<path class="grid" d="M0 {y}h{width}"/>')
            lines.append(f'<text class="y" x="-4" y="{y + 4}">{over}x</text>')
        return [*lines, "</g>"]

    def panel(self, title: str, lines: dict[str, Line]) -> str:
        panel = f'<text class="title" x="{PLOT[0] // 2}" y="-6">{title}</text>\n'
        panel += '<use href="#axes"/>\n'
        for name in (name for name in STYLES if name in lines):
            points = [f"{self.x(t)},{self.y(over)}" for t, over in sorted(lines[name])]
            panel += f'<polyline class="line {name}" points="{" ".join(points)}"/>\n'
        return panel + "</g>"


if __name__ == "__main__":
    sys.exit(main())
