"""The real engine on one GPU, as one rank of a model that tensor parallelism cuts, or
on all of a host's.

``python -m benchmarks.engine`` starts vLLM's engine once for each way to serve a model,
with random weights, and measures

    decode_ms        a step of 1 to 256 sequences with contexts of 16 to 16k tokens
    prefill_ms       the first token of a prompt of 16 to 16384 tokens
    mixed_ms         a step of 64 sequences with a prompt of 2048 tokens beside them
    experts_call_ms  CPU time of one call of the routed experts, not compiled
    load_s, weights_gib, workspace_gib, kv_blocks
    total_s          the process; its last row

Ways: ``this``; ``padded``, stock kernels on padded columns; ``refined``, what stock
does by itself; ``ep``, expert parallelism; ``half``, half the TP size; ``deep_gemm``,
stock DeepGEMM on padded columns; but for the last, experts are Triton's. Modes:
``compiled``, as vLLM compiles by default;
``graphs``, CUDA graphs of decode steps only, nothing compiled; ``eager``; ``served``,
compiled, where ``vllm bench serve`` measures ``vllm serve``: output_tokens_s, ttft_ms
and tpot_ms of 1 to 256 sequences at a time, 1024 random tokens in, 1024 out.

First, with a small checkpoint of the same layers, the rank's logits of ``this`` are
compared with those of ``padded``: they may differ as much as those of ``refined`` do,
or, where stock refuses, by 2**-5.

``--no-compile`` serves prompts of 1 to 16384 tokens and batches of up to 256 instead,
while vLLM's monitor makes an error of each kernel that compiles after the start.

Routers choose by random logits, one draw for all ways and steps. With ``--gpus``, or
where VLLM_MOE_ROUTING_SIMULATION_STRATEGY names one, vLLM's simulation draws experts in
each layer, which takes some time more: ``routing`` of a row.

Other ranks' work and communication are left out: what a step's all-reduces would take,
by a model (``communication.py``), is a column of the rows.

``--gpus 8`` leaves none out: eight ranks that talk to each other. First it is
``vllm-patch parity`` that compares. ``half`` is two engines of four ranks with half the
sequences each, of which one runs but where they are served: vLLM's own data
parallelism cuts experts by all ranks. ``python -m benchmarks.communication ONE EIGHT``
compares files of both kinds.

Each row is on disk once it is known. ``--resume`` goes on with a file of rows, such as
that of ``--minutes`` which were too few. Exits with 1 if ``this`` fails anywhere or its
logits do, or if something is left to do.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import engine_child
from benchmarks.communication import SIMULATED, routing_in
from benchmarks.engine_check import check, parity
from benchmarks.engine_child import OutOfTime, RowFailed
from benchmarks.engine_models import MODELS, Model, small
from benchmarks.engine_row import END, Row
from benchmarks.engine_rows import (
    SIMULATION,
    layers_of,
    place,
    read_rows,
    report,
    routing_of,
    row_of,
    rows_of,
)
from benchmarks.engine_ways import BATCHES, LOAD, MODES, SMALL, WAYS, spec_of
from benchmarks.run import Rows, environment, parser_of
from vllm_patch.cli.synthetic import write_tokenizer

ONE_RANK_WAYS = ["this", "padded", "refined", "ep"]
REAL_WAYS = ["this", "ep", "half", "refined", "padded"]
SWEEP = [*range(1, 1025), *range(1025, 16384, 61), 16384]
SWEPT_BATCHES = [2, 3, 5, 8, 13, 32, 63, 128, 200, 256]


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    common = environment(args.commit)
    for name, value in common.items():
        print(f"{name:8} {value}")
    if args.no_compile:
        return _end([text for model in args.models for text in _sweep(model, args)])
    done = read_rows(args.csv) if args.resume else []
    problems = []
    with open(args.csv, "a" if done else "w", newline="") as file:
        rows = Rows(file, common, header=[*done[0]] if done else None)
        try:
            for text in _run(args, rows, done):
                problems.append(text)
        except OutOfTime:
            problems.append(f"{args.minutes} minutes are over: go on with --resume")
    report(read_rows(args.csv))
    return _end(problems)


def _run(
    args: argparse.Namespace, rows: Rows, done: list[dict[str, str]]
) -> Iterator[str]:
    """Run what is not done; yield problems."""
    for model in args.models:
        if not args.no_check and not rows_of(done, model, "check", "this"):
            yield from (check if args.gpus == 1 else parity)(model, args, rows)
        for mode in args.modes:
            for way in args.ways:
                had = rows_of(done, model, mode, way)
                if END not in {row["measure"] for row in had}:
                    yield from _measure(model, mode, way, args, rows, had)


def _end(problems: list[str]) -> int:
    """Print what went wrong; return the exit status."""
    print(f"\n{len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("engine", __doc__)
    add, models = parser.add_argument, {model.name: model for model in MODELS}
    add("--gpus", type=int, default=1, help="ranks that run (default: one, alone)")
    add("--models", nargs="+", choices=models, default=["Qwen3-235B-TP8"])
    add("--ways", nargs="+", choices=WAYS)
    add("--modes", nargs="+", choices=MODES)
    add("--contexts", nargs="+", type=int, choices=BATCHES)
    add("--layers", type=int, help="of the model (default: all)")
    add("--small", action="store_true", help="try all with a small model, on a CPU too")
    add("--no-compile", action="store_true", help="nothing compiles after the start")
    add("--no-check", action="store_true", help="do not compare logits first")
    add("--minutes", type=float, default=float("inf"), help="end in time")
    add("--resume", action="store_true", help="leave out what is in the file of rows")
    add("--csv", default="engine.csv", help="file for the rows (default: engine.csv)")
    add("--commit", help="commit that is measured, where git cannot tell")
    args = parser.parse_args(argv)
    real = args.gpus > 1
    args.models = [models[name] for name in args.models]
    if args.small:
        args.models = [small(max(2, args.gpus))]
    # What tells most comes first.
    args.ways = args.ways or (REAL_WAYS if real else ONE_RANK_WAYS)
    args.modes = args.modes or (
        ["graphs", "served"] if real else ["compiled", "graphs"]
    )
    contexts = args.contexts or ([1024] if real else BATCHES)
    batches = {context: BATCHES[context] for context in contexts}
    args.load = SMALL if args.small else replace(LOAD, batches=batches)
    args.deadline = time.monotonic() + 60 * args.minutes
    if problem := _unfit(args):
        parser.error(problem)
    return args


def _unfit(args: argparse.Namespace) -> str | None:
    """Return why this machine or an earlier run's rows are not for the arguments."""
    if not torch.cuda.is_available():
        if not args.small:
            return "the engine is measured on a CUDA GPU, with vLLM's build for it"
    elif torch.cuda.device_count() < args.gpus:
        return f"--gpus {args.gpus}: there are {torch.cuda.device_count()}"
    if args.gpus == 1 and "served" in args.modes:
        return "--modes served: one rank alone serves nobody, give --gpus"
    for model in args.models:
        if args.gpus not in (1, model.tp_size):
            return f"--gpus {args.gpus}: {model.name} has {model.tp_size} ranks"
    for row in read_rows(args.csv) if args.resume else ():
        if row.get("ranks") != str(args.gpus):
            return f"--resume: {args.csv} has no rows of --gpus {args.gpus}"
        if routing_in(row) != routing_of(args):
            return (
                f"--resume: {args.csv} has rows whose routing is {routing_in(row)}, "
                f"not {routing_of(args)}, which takes other time: give another file"
            )
        for model in args.models:
            layers = str(layers_of(model, args))
            if row["model"] == model.name and row["layers"] != layers:
                return f"--resume: {args.csv} has rows of {row['layers']} layers"
    return None


def _sweep(model: Model, args: argparse.Namespace) -> list[str]:
    """Serve prompts of many lengths; return what compiled after the start."""
    problems = []
    for mode in args.modes:
        spec = spec_of(model, mode, "this", args, sweep=SWEEP, batches=SWEPT_BATCHES)
        spec["engine"]["jit_monitor_mode"] = "error"
        try:
            _random_weights(model, args.layers or 2, "this", spec, args)
        except RowFailed as error:
            problems.append(f"{model.name}, {mode}: {error}")
        else:
            print(f"{model.name}, {mode}: {len(SWEEP)} prompts compiled nothing")
    return problems


def _random_weights(
    model: Model,
    layers: int | None,
    way: str,
    spec: dict[str, Any],
    args: argparse.Namespace,
    known: Callable[[Row], None] = lambda row: None,
) -> None:
    """Run a process with random weights and random routing; note its rows."""
    module = "benchmarks.serving" if "servers" in spec else "benchmarks.engine_row"
    variables = dict(WAYS[way].environment)
    spec["random_routing"] = routing_of(args) == "router"
    if routing_of(args) == SIMULATED:
        variables[SIMULATION] = os.environ.get(SIMULATION, "uniform_random")
    with tempfile.TemporaryDirectory() as folder:
        config = model.config(layers)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        if "servers" in spec:
            write_tokenizer(config["vocab_size"], Path(folder))
        dummy = {"load_format": "dummy", "gpu_memory_utilization": 0.85}
        spec["engine"].update(model=folder, **dummy)
        engine_child.process(spec, variables, module, known, args.deadline)


def _measure(
    model: Model,
    mode: str,
    way: str,
    args: argparse.Namespace,
    rows: Rows,
    had: list[dict[str, str]],
) -> list[str]:
    """Add the rows of one process, but for those that an earlier one had.

    Returns:
        What went wrong where it must not.

    """
    before = {place(row) for row in had}
    told = _served if mode == "served" else _stepped
    spec = told(model, mode, way, args, before)
    found: list[Row] = []

    def known(row: Row) -> None:
        found.append(row)
        if place(row) not in before:
            rows.add(row_of(model, mode, way, args, row))

    print(f"{model.name}, {mode}, {way} ...", flush=True)
    try:
        _random_weights(model, args.layers, way, spec, args, known)
    except RowFailed as error:
        known({"measure": "error", "value": str(error)})
    print(f"  {_summary(found)}", flush=True)
    failed = [each["value"] for each in found if each["measure"] == "error"]
    return [f"{model.name}, {mode}: {why}" for why in failed if way == "this"]


def _stepped(
    model: Model, mode: str, way: str, args: argparse.Namespace, before: set
) -> dict[str, Any]:
    """Return what a process of ``engine_row`` is told, less what is measured."""
    decode = {}
    for context, batches in args.load.batches.items():
        if args.gpus > 1 and WAYS[way].halves:
            # Its half of them, and all for the rows of one rank.
            batches = sorted({*batches, *(max(1, n // 2) for n in batches)})
        places = {n: ("decode_ms", str(n), str(context)) for n in batches}
        decode[context] = [n for n, where in places.items() if where not in before]
    return spec_of(
        *(model, mode, way, args),
        prefill=[
            n for n in args.load.prompts if ("prefill_ms", str(n), "") not in before
        ],
        decode=decode,
        mixed=args.load.mixed,
        calls=args.gpus == 1 and mode != "compiled",
    )


def _served(
    model: Model, mode: str, way: str, args: argparse.Namespace, before: set
) -> dict[str, Any]:
    """Return what a process of ``serving`` is told, less what is measured."""
    tokens_in, tokens_out = args.load.served
    places = {n: ("tpot_ms", str(n), str(tokens_in)) for n in args.load.concurrent}
    spec = spec_of(
        *(model, mode, way, args),
        servers=1 + WAYS[way].halves,
        concurrent=[n for n, where in places.items() if where not in before],
        input=tokens_in,
        output=tokens_out,
    )
    # As servers run.
    for name in ("skip_tokenizer_init", "async_scheduling"):
        del spec["engine"][name]
    return spec


def _summary(found: list[dict[str, Any]]) -> str:
    values = {(f["measure"], f.get("tokens"), f.get("context")): f for f in found}
    cells = []
    for measure, tokens, context in (
        ("error", None, None),
        *(("decode_ms", batch, 1024) for batch in BATCHES[1024]),
        *(("tpot_ms", batch, 1024) for batch in LOAD.concurrent),
        *(("prefill_ms", tokens, None) for tokens in (2048, 16384)),
        ("kv_blocks", None, None),
        (END, None, None),
    ):
        if each := values.get((measure, tokens, context)):
            value = each["value"]
            shown = f"{value:.4g}" if isinstance(value, float) else value
            cells.append(f"{measure} {tokens or ''} {shown}".replace("  ", " "))
    return ", ".join(cells)


if __name__ == "__main__":
    # As Ctrl-C does: what runs is ended.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    sys.exit(main())
