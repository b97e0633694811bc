"""Draws lines in panels, as an SVG: what the plots of both benchmarks share."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Style:
    """How a line is drawn.

    Attributes:
        text: What it is.
        color: One of Okabe and Ito's.
        dashes: ``stroke-dasharray``.
        marker: Path of a point.

    """

    text: str
    color: str
    dashes: str
    marker: str


@dataclass(frozen=True)
class Panel:
    """One panel; both of its axes are logarithmic.

    Attributes:
        title: Above it.
        lines: By the name of a style: x and y of points.

    """

    title: str
    lines: dict[str, list[tuple[int, float]]]

    @property
    def xs(self) -> tuple[int, ...]:
        return tuple(sorted({x for line in self.lines.values() for x, _ in line}))


def drawing(
    title: str,
    panels: Sequence[Panel],
    styles: dict[str, Style],
    ticks: Sequence[float],
) -> str:
    """Return an SVG.

    Args:
        title: Above all.
        panels: In rows of PER_ROW.
        styles: By name; the first is drawn first.
        ticks: Values of y that have a line, from the least to the largest shown.

    """
    width = PER_ROW * PANEL[0]
    height = TOP + math.ceil(len(panels) / PER_ROW) * PANEL[1]
    axes = {xs: _Axes(index, xs, ticks) for index, xs in enumerate(_different(panels))}
    used = {name for panel in panels for name in panel.lines}
    named = {name: style for name, style in styles.items() if name in used}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        f"<style>{CSS}{''.join(_css(*each) for each in named.items())}</style>",
        "<defs>",
        *(_marker(*each) for each in named.items()),
        *(line for each in axes.values() for line in each.grid()),
        "</defs>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text class="title" x="{width // 2}" y="18">{title}</text>',
        *_legend(named),
    ]
    for index, panel in enumerate(panels):
        x, y = index % PER_ROW * PANEL[0] + 40, index // PER_ROW * PANEL[1] + TOP + 20
        lines.append(f'<g transform="translate({x} {y})">')
        lines.append(axes[panel.xs].drawn(panel, named))
    return "\n".join([*lines, "</svg>", ""])


def _different(panels: Sequence[Panel]) -> Iterable[tuple[int, ...]]:
    return dict.fromkeys(panel.xs for panel in panels)


def _css(name: str, style: Style) -> str:
    return (
        f".{name} {{ stroke: {style.color}; stroke-dasharray: {style.dashes}; "
        f"marker: url(#{name}) }}\n"
    )


def _marker(name: str, style: Style) -> str:
    return (
        f'<marker id="{name}" viewBox="-5 -5 10 10" markerWidth="10" markerHeight="10" '
        f'markerUnits="userSpaceOnUse"><path fill="{style.color}" '
        f'd="{style.marker}"/></marker>'
    )


def _legend(styles: dict[str, Style]) -> list[str]:
    lines, each = [], PER_ROW * PANEL[0] // 3
    for index, (name, style) in enumerate(styles.items()):
        x, y = index % 3 * each + 20, index // 3 * 16 + 36
        lines += [
            f'<path class="line {name}" d="M{x} {y}h20h20"/>',
            f'<text class="legend" x="{x + 48}" y="{y + 4}">{style.text}</text>',
        ]
    return lines


@dataclass(frozen=True)
class _Axes:
    """Of panels with the same values of x."""

    index: int
    xs: tuple[int, ...]
    ticks: Sequence[float]

    def x(self, value: int) -> float:
        first, last = math.log2(self.xs[0]), math.log2(self.xs[-1])
        share = (math.log2(value) - first) / max(1, last - first)
        return round(10 + share * (PLOT[0] - 20), 1)

    def y(self, value: float) -> float:
        least, most = math.log2(self.ticks[0]), math.log2(self.ticks[-1])
        return round(PLOT[1] * (1 - (math.log2(value) - least) / (most - least)), 1)

    def grid(self) -> list[str]:
        lines, (width, height) = [f'<g id="axes{self.index}">'], PLOT
        for value in self.xs:
            lines.append(f'<path class="grid" d="M{self.x(value)} 0v{height}"/>')
            text = f"{value >> 10}k" if value >= 1024 else value
            lines.append(f'<text x="{self.x(value)}" y="{height + 14}">{text}</text>')
        for tick in self.ticks:
            y = self.y(tick)
            lines.append(f'<path class="grid" d="M0 {y}h{width}"/>')
            lines.append(f'<text class="y" x="-4" y="{y + 4}">{tick:g}x</text>')
        return [*lines, "</g>"]

    def drawn(self, panel: Panel, styles: dict[str, Style]) -> str:
        title = f'<text class="title" x="{PLOT[0] // 2}" y="-6">{panel.title}</text>'
        lines = [title, f'<use href="#axes{self.index}"/>']
        for name in (name for name in styles if name in panel.lines):
            points = [f"{self.x(x)},{self.y(y)}" for x, y in sorted(panel.lines[name])]
            lines.append(f'<polyline class="line {name}" points="{" ".join(points)}"/>')
        return "\n".join([*lines, "</g>"])
