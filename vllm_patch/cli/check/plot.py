# SPDX-License-Identifier: Apache-2.0
"""Draws how ranks cut the quant blocks of a layer."""

from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

from vllm_patch.cli import UsageError
from vllm_patch.cli.check.layers import Dimension
from vllm_patch.cli.check.verdict import Row, Verdict, shared_blocks

# In pixels: all, what is left and above of blocks, and a rank's row. At most so many of
# each are drawn.
WIDTH, LEFT, TOP, ROW, BAR = 880, 70, 116, 26, 16
MOST_BLOCKS, MOST_RANKS = 24, 16
# Okabe and Ito's, which colour-blind people tell apart.
CSS = """
text { font: 12px sans-serif; fill: #000 }
.title { font-size: 15px; font-weight: bold }
.middle { text-anchor: middle }
.end { text-anchor: end }
.own { fill: #56B4E9 }
.shared { fill: #E69F00 }
.padding { fill: url(#hatch); stroke: #999; stroke-width: .5 }
.block { stroke: #777; stroke-dasharray: 3 3 }
"""
HATCH = (
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse">'
    '<rect width="6" height="6" fill="#fff"/><path d="M0 6L6 0" stroke="#999"/>'
    "</pattern>"
)


def write(verdicts: list[Verdict], file: Path) -> Row | None:
    """Draw the first layer that is cut, experts if some are, and return it.

    Without one, nothing is written, and None is returned.

    Raises:
        UsageError: The file's name is of no image that can be written, or its folder is
            not there.

    """
    if file.suffix not in (".svg", ".png"):
        raise UsageError(f"--plot {file}: give a name that ends in .svg or .png.")
    rows = [row for v in verdicts for row in v.rows if _cut(row) and row.is_taken]
    if not rows:
        return None
    row = min(rows, key=lambda row: row.layer.kind != "experts")
    image = drawing(row).encode()
    if file.suffix == ".png":
        image = _png(image)
    try:
        file.write_bytes(image)
    except OSError as error:
        raise UsageError(f"--plot {file}: {error}. Give another place.") from error
    return row


def _png(svg: bytes) -> bytes:
    try:
        import cairosvg
    except (ImportError, OSError) as error:  # The latter without the cairo library.
        raise UsageError(
            f"A .png needs cairosvg and the system's cairo library ({error}): pip "
            "install 'vllm-patch[png]', or give a .svg."
        ) from error
    return cairosvg.svg2png(svg, scale=2)


def _cut(row: Row) -> list[Dimension]:
    """Return the dimensions of which several ranks hold parts of a block."""
    return [dimension for dimension in row.cut if dimension.parts > 1]


def drawing(row: Row) -> str:
    """Return an SVG of the first dimension of a layer that ranks cut."""
    return _Drawing(_cut(row)[0], row.block, row.layer.name, row.setting.tp).svg()


def _rect(kind: str, x: float, y: float, width: float, rest: str) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y}" width="{width:g}" {rest}/>'


class _Drawing:
    def __init__(self, dimension: Dimension, block: int, name: str, tp: int):
        self.dimension, self.block, self.name, self.tp = dimension, block, name, tp
        self.shared = shared_blocks(dimension, block)
        self.ranks = min(dimension.parts, MOST_RANKS)
        last = dimension.shard(block, (self.ranks - 1) * dimension.replicas)
        self.blocks = min(last.first_block + last.num_blocks, MOST_BLOCKS)
        self.scale = (WIDTH - LEFT - 20) / (self.blocks * block)

    def x(self, column: int) -> float:
        return round(LEFT + min(column, self.blocks * self.block) * self.scale, 1)

    def svg(self) -> str:
        height = TOP + (self.ranks + 1) * ROW + 74
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
            f"<style>{CSS}</style><defs>{HATCH}</defs>",
            '<rect width="100%" height="100%" fill="#fff"/>',
            *self._heading(),
            *self._checkpoint(),
            *(line for rank in range(self.ranks) for line in self._rank(rank)),
            *self._legend(height - 52),
            "</svg>",
        ]
        return "\n".join([*lines, ""])

    def _heading(self) -> list[str]:
        each, block = self.dimension, self.block
        title = f"{self.name}: {each.total} columns on {self.tp} GPUs (ranks)"
        said = (
            f"Each rank gets {each.size} columns, {each.size / block:g} quant blocks: "
            f"{len(self.shared)} of {-(-each.total // block)} blocks lie on two ranks "
            "or more."
        )
        what = (
            f"A quant block is {block} columns that were compressed together and share "
            "one scale; without it, none of them can be read."
        )
        return [
            f'<text class="title" x="12" y="24">{escape(title)}</text>',
            f'<text x="12" y="46">{said}</text>',
            f'<text x="12" y="64">{what}</text>',
        ]

    def _checkpoint(self) -> list[str]:
        """Draw the blocks, each with the number of its scale."""
        y, bottom = TOP - 14, TOP + self.ranks * ROW + BAR
        lines = [f'<text class="end" x="{LEFT - 8}" y="{y + 13}">scales</text>']
        for number in range(self.blocks):
            left, right = (self.x((number + i) * self.block) for i in (0, 1))
            kind = "shared" if number in self.shared else "own"
            width, middle = round(right - left - 4, 1), (left + right) / 2
            lines += [
                _rect(kind, left + 2, y, width, 'height="18" rx="4"'),
                f'<text class="middle" x="{middle:g}" y="{y + 13}">{number}</text>',
                f'<path class="block" d="M{left:g} {y - 4}V{bottom}"/>',
            ]
        end = self.x(self.blocks * self.block)
        return [*lines, f'<path class="block" d="M{end:g} {y - 4}V{bottom}"/>']

    def _rank(self, rank: int) -> list[str]:
        """Draw a rank's columns where they lie, between what pads them."""
        shard = self.dimension.shard(self.block, rank * self.dimension.replicas)
        y = TOP + rank * ROW + BAR
        begin = shard.first_block * self.block
        end = begin + shard.span
        lines = [f'<text class="end" x="{LEFT - 8}" y="{y + 12}">rank {rank}</text>']
        if self.dimension.replicas > 1:
            first = rank * self.dimension.replicas
            label = f"{first}-{first + self.dimension.replicas - 1}"
            lines = [f'<text class="end" x="{LEFT - 8}" y="{y + 12}">{label}</text>']
        stop = shard.start + shard.size
        marks = sorted({begin, shard.start, stop, end, *range(begin, end, self.block)})
        for left, right in pairwise(marks):
            kind = "own"
            if left < shard.start or left >= stop:
                kind = "padding"
            elif left // self.block in self.shared:
                kind = "shared"
            width = round(self.x(right) - self.x(left), 1)
            if width > 0:
                lines.append(_rect(kind, self.x(left), y, width, f'height="{BAR}"'))
        return lines

    def _legend(self, y: int) -> list[str]:
        texts = {
            "own": (12, "block of one rank alone"),
            "shared": (210, "block on several ranks: each gets its scale"),
            "padding": (510, "no columns of this rank: skipped, or filled with zeros"),
        }
        lines = []
        for kind, (x, text) in texts.items():
            lines += [
                f'<rect class="{kind}" x="{x}" y="{y}" width="18" height="12"/>',
                f'<text x="{x + 24}" y="{y + 11}">{text}</text>',
            ]
        hidden = self.dimension.parts - self.ranks
        if hidden or self.x(self.dimension.total) < self.x(self.blocks * self.block):
            lines.append(
                f'<text x="12" y="{y + 36}">{hidden} more ranks likewise</text>'
            )
        return lines
