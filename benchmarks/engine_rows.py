"""Rows of ``benchmarks.engine`` in its CSV, and the tables that it prints of them."""

import argparse
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import communication
from benchmarks.engine_models import Model
from benchmarks.engine_ways import WAYS
from benchmarks.plot_moe import read

# A strategy of vLLM's, where each layer draws scores and sorts them.
SIMULATION = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"


def row_of(
    model: Model, mode: str, way: str, args: argparse.Namespace, found: dict[str, Any]
) -> dict[str, Any]:
    """Return a row of the CSV, with the time of a step's communication."""
    layers = layers_of(model, args)
    tokens, added = found.get("tokens"), ""
    timed = found["measure"] in ("decode_ms", "prefill_ms", "mixed_ms")
    if timed and args.gpus == 1:
        hidden = model.sizes["hidden_size"]
        added = f"{communication.step_ms(tokens, hidden, layers):.3f}"
    return {
        "model": model.name,
        "tp_size": model.tp_size // (1 + WAYS[way].halves),
        "ranks": args.gpus,
        "layers": layers,
        "mode": mode,
        "way": way,
        "routing": routing_of(args),
        "experts": found.get("experts", ""),
        "measure": found["measure"],
        "tokens": tokens or "",
        "context": found.get("context", ""),
        "value": _number(found["value"]),
        "p90": _number(found.get("p90", "")),
        "communication_ms": added,
    }


def routing_of(args: argparse.Namespace) -> str:
    """Return who sends tokens to experts, which takes time of its own."""
    if not torch.cuda.is_available():
        return "experts"  # Those of vLLM for CPUs choose by themselves.
    # Workers of several ranks are processes of their own, which cannot be changed.
    simulates = args.gpus > 1 or SIMULATION in os.environ
    return communication.SIMULATED if simulates else "router"


def layers_of(model: Model, args: argparse.Namespace) -> int:
    return args.layers or model.sizes["num_hidden_layers"]


def _number(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def place(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["measure"], str(row.get("tokens", "")), str(row.get("context", ""))


def read_rows(path: str) -> list[dict[str, str]]:
    return read(path) if Path(path).is_file() else []


def rows_of(
    rows: list[dict[str, str]], model: Model, mode: str, way: str
) -> list[dict[str, str]]:
    """Return the rows of one process."""
    wanted = model.name, mode, way
    return [r for r in rows if (r["model"], r["mode"], r["way"]) == wanted]


def tables(rows: list[dict[str, str]]) -> Iterator[tuple[str, dict[str, dict]]]:
    """Yield title and way -> (measure, tokens, context) -> value of each table."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        if row["measure"] in ("error", "logits", "parity"):
            continue
        table = found.setdefault((row["model"], row["mode"]), {})
        table.setdefault(row["way"], {})[place(row)] = float(row["value"])
    for (model, mode), table in found.items():
        yield f"{model}, {mode}", table


def report(rows: list[dict[str, str]]) -> None:
    """Print all values by way, and how many times faster ``this`` is."""
    for title, table in tables(rows):
        ways = [way for way in WAYS if way in table]
        print(f"\n{title}\n{'':34}" + "".join(f"{way:>12}" for way in ways))
        for where in dict.fromkeys(each for way in ways for each in table[way]):
            cells = "".join(
                f"{table[way][where]:12.4g}" if where in table[way] else f"{'-':>12}"
                for way in ways
            )
            print(f"  {' '.join(filter(None, where)):32}{cells}")
        for measure in ("decode_ms", "prefill_ms"):
            for way in ways[1:]:
                _print_ratio(measure, way, table)


def _print_ratio(measure: str, way: str, table: dict[str, dict]) -> None:
    ours, theirs = table.get("this", {}), table[way]
    ratios = {
        where: theirs[where] / ours[where]
        for where in ours
        if where[0] == measure and where in theirs
    }
    if ratios:
        mean, worst = statistics.geometric_mean(ratios.values()), min(ratios.values())
        where = " ".join(filter(None, min(ratios, key=ratios.get)[1:]))
        print(f"  {measure}: {way} / this {mean:.2f}, least {worst:.2f} ({where})")
