"""The real engine on one GPU, as one rank of a model that tensor parallelism cuts.

``python -m benchmarks.engine`` starts vLLM's engine once for each way to serve a model,
with random weights and a router that sends tokens anywhere, and measures

    decode_ms        a step of 1 to 256 sequences with contexts of 1k and 16k tokens
    prefill_ms       the first token of a prompt of 16 to 16384 tokens
    mixed_ms         a step of 64 sequences with a prompt of 2048 tokens beside them
    experts_call_ms  CPU time of one call of the routed experts, not compiled
    load_s, weights_gib, workspace_gib, kv_blocks

Ways: ``this``; ``padded``, stock kernels on padded columns; ``refined``, what stock
does by itself; ``ep``, expert parallelism; ``half``, half the TP size; ``deep_gemm``,
stock DeepGEMM on padded columns. Modes: ``compiled``, as vLLM runs by default;
``graphs``, CUDA graphs of decode steps only, nothing compiled; ``eager``.

First, with a small checkpoint of the same layers, the rank's logits of ``this`` are
compared with those of ``padded``: they may differ as much as those of ``refined`` do,
or, where stock refuses, by 2**-5.

``--no-compile`` serves prompts of 1 to 16384 tokens and batches of up to 256 instead,
while vLLM's monitor makes an error of each kernel that compiles after the start.

Other ranks' work and communication are left out: what a step's all-reduces would take,
by a model (``communication.py``), is a column of the rows. ``--resume`` goes on with a
file of rows. Exits with 1 if ``this`` fails anywhere or its logits do.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import communication
from benchmarks.engine_models import MODELS, Model
from benchmarks.run import Rows, environment, parser_of
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint

RANK = 1
PROMPTS = [16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384]
BATCHES = {16: [1, 4, 16, 64, 256], 1024: [1, 4, 16, 64, 256], 16384: [1, 16]}
# Of each engine that is measured or compared.
COMMON = {
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "disable_custom_all_reduce": True,
    # A step ends with its tokens.
    "async_scheduling": False,
    "disable_log_stats": True,
    "seed": 0,
}
GRAPH_SIZES = [1, 4, 16, 64, 256, 512]
MODES: dict[str, dict[str, Any]] = {
    "compiled": {"compilation_config": {"cudagraph_capture_sizes": GRAPH_SIZES}},
    "graphs": {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": GRAPH_SIZES,
        }
    },
    "eager": {"enforce_eager": True},
}
ENVIRONMENT = {
    # The engine in the process that measures it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Its warm-up takes many minutes. Linear layers are the same for all ways; experts
    # of expert parallelism, which are DeepGEMM's without FlashInfer's, become Triton's.
    "VLLM_USE_DEEP_GEMM": "0",
}
RANDOM_ROUTING = {"VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random"}
TOLERATED = 2**-5
SWEEP = [*range(1, 1025), *range(1025, 16384, 61), 16384]
SWEPT_BATCHES = [2, 3, 5, 8, 13, 32, 63, 128, 200, 256]
CHECKED = {"num_hidden_layers": 2, "vocab_size": 8192}
SECONDS = 900


@dataclass(frozen=True)
class Way:
    """How a rank's share of a model is served.

    Attributes:
        environment: Variables that choose it.
        engine: Arguments of ``vllm.LLM``, likewise.
        halves: It has half the TP size.

    """

    environment: dict[str, str]
    engine: dict[str, Any]
    halves: bool = False


def _padding(mode: str) -> dict[str, str]:
    return {"VLLM_FP8_TP_PADDING": mode}


WAYS = {
    "this": Way(_padding("auto"), {}),
    "padded": Way(_padding("padded"), {}),
    "refined": Way(_padding("off"), {}),
    "ep": Way(_padding("off"), {"enable_expert_parallel": True}),
    "half": Way(_padding("off"), {}, halves=True),
    "deep_gemm": Way(
        {
            **_padding("auto"),
            "VLLM_USE_DEEP_GEMM": "1",
            "VLLM_DEEP_GEMM_WARMUP": "skip",
        },
        {"moe_backend": "deep_gemm"},
    ),
}


class RowFailed(Exception):
    """A process ended without a result; the message is the first line of why."""

    def __init__(self, why: str, log: str = ""):
        super().__init__(why)
        self.log = log


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    common = environment(args.commit)
    for name, value in common.items():
        print(f"{name:8} {value}")
    if args.no_compile:
        return _end([text for model in args.models for text in _sweep(model, args)])
    done = _read(args.csv) if args.resume else []
    problems = []
    with open(args.csv, "a" if done else "w", newline="") as file:
        rows = Rows(file, common, header=[*done[0]] if done else None)
        for model in args.models:
            if not args.no_check and not _has(done, model, "check"):
                problems += _check(model, args, rows)
            for mode in args.modes:
                for way in args.ways:
                    if not _has(done, model, mode, way):
                        problems += _measure(model, mode, way, args, rows)
    _report(_read(args.csv))
    return _end(problems)


def _end(problems: list[str]) -> int:
    """Print what went wrong; return the exit status."""
    print(f"\n{len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("engine", __doc__)
    add, models = parser.add_argument, {model.name: model for model in MODELS}
    add("--models", nargs="+", choices=models, default=["Qwen3-235B-TP8"])
    add("--ways", nargs="+", choices=WAYS, default=["this", "padded", "refined", "ep"])
    add("--modes", nargs="+", choices=MODES, default=["compiled", "graphs"])
    add("--contexts", nargs="+", type=int, choices=BATCHES, default=[*BATCHES])
    add("--layers", type=int, help="of the model (default: all)")
    add("--no-compile", action="store_true", help="nothing compiles after the start")
    add("--no-check", action="store_true", help="do not compare logits first")
    add("--resume", action="store_true", help="leave out what is in the file of rows")
    add("--csv", default="engine.csv", help="file for the rows (default: engine.csv)")
    add("--commit", help="commit that is measured, where git cannot tell")
    args = parser.parse_args(argv)
    args.models = [models[name] for name in args.models]
    if not torch.cuda.is_available():
        parser.error("the engine is measured on a CUDA GPU, with vLLM's build for it")
    return args


# -- one process a row ----------------------------------------------------------


def spec_of(model: Model, mode: str, way: str, **measures: Any) -> dict[str, Any]:
    """Return what a process of ``engine_row`` is told, but for the checkpoint."""
    chosen = WAYS[way]
    engine = {
        **COMMON,
        "max_model_len": 20000,
        "max_num_batched_tokens": 16384,
        "max_num_seqs": 256,
        # vLLM's choice on Hopper; elsewhere FlashInfer's might be.
        "attention_backend": "FLASH_ATTN",
        **MODES[mode],
        **chosen.engine,
    }
    tp_size = model.tp_size // 2 if chosen.halves else model.tp_size
    return {"tp_size": tp_size, "rank": RANK, "engine": engine, **measures}


def process(
    spec: dict[str, Any],
    variables: dict[str, str],
    module: str = "benchmarks.engine_row",
) -> dict[str, Any]:
    """Return what a process of a module finds out.

    Raises:
        RowFailed: It ended without a result, or did not end.

    """
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "spec.json", Path(folder) / "out.json"
        given.write_text(json.dumps(spec))
        command = [sys.executable, "-m", module, given, found]
        # A message may hold what the terminal would not show.
        with open(Path(folder) / "log", "w+", errors="replace") as log:
            try:
                subprocess.run(
                    command,
                    env={**os.environ, **ENVIRONMENT, **variables},
                    stdout=log,
                    stderr=log,
                    timeout=SECONDS,
                )
            except subprocess.TimeoutExpired:
                raise RowFailed(f"not done after {SECONDS} s") from None
            if found.is_file():
                return json.loads(found.read_text())
            log.seek(0)
            text = log.read()
            raise RowFailed(_reason(text), text)


def _reason(log: str) -> str:
    """Return the last error that a log names; the last line where it names none."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or ["no output"])[-1][-300:]


# -- logits first -----------------------------------------------------------------


def _check(model: Model, args: argparse.Namespace, rows: Rows) -> list[str]:
    """Compare the rank's logits; return what is wrong with them."""
    with tempfile.TemporaryDirectory() as folder:
        _write_small(model, Path(folder))
        found = {way: _logits(model, way, folder) for way in ("this", "padded")}
        found["refined"] = _logits(model, "refined", folder)
    for way in ("this", "padded"):
        if isinstance(found[way], str):
            return [f"{model.name}, check, {way}: {found[way]}"]
    error = _difference(found["this"], found["padded"])
    stock_refuses = isinstance(found["refined"], str)
    control = (
        TOLERATED if stock_refuses else _difference(found["refined"], found["padded"])
    )
    print(f"{model.name}: logits differ by {error:.2e}, may by {control:.2e}")
    row = {"value": error, "p90": control, "unit": "relative"}
    rows.add(_row(model, "check", "this", args, {"measure": "logits", **row}))
    if error <= control:
        return []
    return [f"{model.name}: logits differ by {error:.2e} of at most {control:.2e}"]


def _write_small(model: Model, folder: Path) -> None:
    """Write a checkpoint of the same layers, but few of them and few experts."""
    experts = {
        name: 16
        for name in ("num_experts", "n_routed_experts")
        if name in model.config()
    }
    fields = model.config(CHECKED["num_hidden_layers"], **CHECKED, **experts)
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    write_checkpoint(ModelConfig.read(path), folder)


def _logits(model: Model, way: str, folder: str) -> "torch.Tensor | str":
    """Return a rank's logits, or why there are none."""
    out = f"{folder}/{way}.pt"
    spec = spec_of(model, "eager", way, logits=out)
    spec["engine"].update(model=folder, gpu_memory_utilization=0.3)
    print(f"{model.name}: logits of {way} ...", flush=True)
    try:
        process(spec, WAYS[way].environment)
    except RowFailed as error:
        return str(error)
    return torch.load(out)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest relative difference of a prompt's logits."""
    return ((one - other).norm(dim=-1) / other.norm(dim=-1)).max().item()


# -- compilation --------------------------------------------------------------------


def _sweep(model: Model, args: argparse.Namespace) -> list[str]:
    """Serve prompts of many lengths; return what compiled after the start."""
    problems = []
    for mode in args.modes:
        spec = spec_of(model, mode, "this", sweep=SWEEP, batches=SWEPT_BATCHES)
        spec["engine"]["jit_monitor_mode"] = "error"
        try:
            _random_weights(model, args.layers or 2, "this", spec)
        except RowFailed as error:
            problems.append(f"{model.name}, {mode}: {error}")
        else:
            print(f"{model.name}, {mode}: {len(SWEEP)} prompts compiled nothing")
    return problems


# -- time -------------------------------------------------------------------------


def _random_weights(
    model: Model, layers: int | None, way: str, spec: dict[str, Any]
) -> dict[str, Any]:
    """Return what a process finds out with random weights and random routing."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model.config(layers)))
        dummy = {"load_format": "dummy", "gpu_memory_utilization": 0.85}
        spec["engine"].update(model=folder, **dummy)
        return process(spec, {**RANDOM_ROUTING, **WAYS[way].environment})


def _measure(
    model: Model, mode: str, way: str, args: argparse.Namespace, rows: Rows
) -> list[str]:
    """Add the rows of one process; return what went wrong where it must not."""
    spec = spec_of(
        *(model, mode, way),
        prefill=PROMPTS,
        decode={context: BATCHES[context] for context in args.contexts},
        mixed=True,
        calls=mode != "compiled",
    )
    started = time.monotonic()
    print(f"{model.name}, {mode}, {way} ...", flush=True)
    try:
        found = _random_weights(model, args.layers, way, spec)
    except RowFailed as error:
        found = {"rows": [{"measure": "error", "value": str(error)}]}
    for each in found["rows"]:
        each["experts"] = found.get("experts", "")
        rows.add(_row(model, mode, way, args, each))
    print(
        f"  {_summary(found['rows'])}; {time.monotonic() - started:.0f} s", flush=True
    )
    failed = [each["value"] for each in found["rows"] if each["measure"] == "error"]
    return [f"{model.name}, {mode}: {why}" for why in failed if way == "this"]


def _summary(found: list[dict[str, Any]]) -> str:
    values = {(f["measure"], f.get("tokens"), f.get("context")): f for f in found}
    cells = []
    for measure, tokens, context in (
        ("error", None, None),
        *(("decode_ms", batch, 1024) for batch in BATCHES[1024]),
        *(("prefill_ms", tokens, None) for tokens in (2048, 16384)),
        ("kv_blocks", None, None),
    ):
        if each := values.get((measure, tokens, context)):
            value = each["value"]
            shown = f"{value:.4g}" if isinstance(value, float) else value
            cells.append(f"{measure} {tokens or ''} {shown}".replace("  ", " "))
    return ", ".join(cells)


def _row(
    model: Model, mode: str, way: str, args: argparse.Namespace, found: dict[str, Any]
) -> dict[str, Any]:
    """Return a row of the CSV, with the time of a step's communication."""
    layers = args.layers or model.sizes["num_hidden_layers"]
    tokens, added = found.get("tokens"), ""
    if found["measure"] in ("decode_ms", "prefill_ms", "mixed_ms"):
        hidden = model.sizes["hidden_size"]
        added = f"{communication.step_ms(tokens, hidden, layers):.3f}"
    return {
        "model": model.name,
        "tp_size": model.tp_size // (1 + WAYS[way].halves),
        "layers": layers,
        "mode": mode,
        "way": way,
        "experts": found.get("experts", ""),
        "measure": found["measure"],
        "tokens": tokens or "",
        "context": found.get("context", ""),
        "value": _number(found["value"]),
        "p90": _number(found.get("p90", "")),
        "communication_ms": added,
    }


def _number(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


# -- report -----------------------------------------------------------------------


def _read(path: str) -> list[dict[str, str]]:
    if not Path(path).is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _has(rows: list[dict[str, str]], model: Model, mode: str, way: str = "this"):
    """Whether a process of these is in rows that are read."""
    wanted = model.name, mode, way
    return any((r["model"], r["mode"], r["way"]) == wanted for r in rows)


def tables(rows: list[dict[str, str]]) -> Iterator[tuple[str, dict[str, dict]]]:
    """Yield title and way -> (measure, tokens, context) -> value of each table."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        if row["measure"] in ("error", "logits"):
            continue
        table = found.setdefault((row["model"], row["mode"]), {})
        where = row["measure"], row["tokens"], row["context"]
        table.setdefault(row["way"], {})[where] = float(row["value"])
    for (model, mode), table in found.items():
        yield f"{model}, {mode}", table


def _report(rows: list[dict[str, str]]) -> None:
    """Print all values by way, and how many times faster ``this`` is."""
    for title, table in tables(rows):
        ways = [way for way in WAYS if way in table]
        print(f"\n{title}\n{'':34}" + "".join(f"{way:>12}" for way in ways))
        places = dict.fromkeys(place for way in ways for place in table[way])
        for place in places:
            cells = "".join(
                f"{table[way][place]:12.4g}" if place in table[way] else f"{'-':>12}"
                for way in ways
            )
            print(f"  {' '.join(filter(None, place)):32}{cells}")
        for measure in ("decode_ms", "prefill_ms"):
            for way in ways[1:]:
                _print_ratio(measure, way, table)


def _print_ratio(measure: str, way: str, table: dict[str, dict]) -> None:
    ours, theirs = table.get("this", {}), table[way]
    ratios = {
        place: theirs[place] / ours[place]
        for place in ours
        if place[0] == measure and place in theirs
    }
    if ratios:
        mean, worst = statistics.geometric_mean(ratios.values()), min(ratios.values())
        where = " ".join(filter(None, min(ratios, key=ratios.get)[1:]))
        print(f"  {measure}: {way} / this {mean:.2f}, least {worst:.2f} ({where})")


if __name__ == "__main__":
    sys.exit(main())
