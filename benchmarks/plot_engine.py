"""Draws the rows of ``python -m benchmarks.engine --csv FILE``.

``python -m benchmarks.plot_engine FILE OUT.svg`` draws, for a model, how many times as
fast as stock vLLM each way to serve it is: decode steps by sequences, and the first
token by the prompt's tokens. Higher is better.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.engine_rows import tables
from benchmarks.panels import Panel, drawing
from benchmarks.plot_moe import STYLES as EXPERTS
from benchmarks.plot_moe import read

STOCK = "refined"
STYLES = {
    "this": replace(EXPERTS["ours"], text="this package"),
    "padded": EXPERTS["padded"],
    STOCK: replace(EXPERTS[STOCK], text=f"stock ({STOCK} blocks)"),
    "half": EXPERTS["half_tp"],
    "ep": replace(EXPERTS["ep"], text="expert parallel"),
}
CONTEXT = "1024"
TICKS = (0.5, 0.75, 1, 1.25, 1.5, 2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", help="file of benchmarks.engine")
    parser.add_argument("out", help="file of the image, an SVG")
    parser.add_argument("--model", default="Qwen3-235B-TP8")
    parser.add_argument("--mode", default="compiled")
    args = parser.parse_args(argv)
    rows = read(args.csv)
    table = dict(tables(rows)).get(f"{args.model}, {args.mode}", {})
    if "this" not in table or STOCK not in table:
        parser.error(f"{args.csv} has no rows of this and {STOCK}: run them first")
    Path(args.out).write_text(image(f"{args.model}, {args.mode}", rows[0], table))
    return 0


def image(what: str, row: dict[str, str], table: dict[str, dict]) -> str:
    where = f"{row['gpu']}, vLLM {row['vllm']}"
    title = f"{what}: times as fast as stock, one rank alone on {where}"
    panels = [
        _panel("decode, by sequences of 1k tokens", "decode_ms", CONTEXT, table),
        _panel("first token, by tokens of the prompt", "prefill_ms", "", table),
    ]
    return drawing(title, panels, STYLES, TICKS)


def _panel(title: str, measure: str, context: str, table: dict[str, dict]) -> Panel:
    stock = {
        p: v for p, v in table[STOCK].items() if (p[0], p[2]) == (measure, context)
    }
    lines = {
        way: [
            (int(place[1]), value / table[way][place])
            for place, value in stock.items()
            if place in table[way]
        ]
        for way in STYLES
        if way in table
    }
    return Panel(title, lines)


if __name__ == "__main__":
    sys.exit(main())
