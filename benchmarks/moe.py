"""Experts cut inside a quant block: the masked path against what vLLM could do.

``python -m benchmarks.moe`` builds vLLM's layers for one rank, first checks them
against an fp32 reference and then times CUDA graphs. Columns, in microseconds:

    floor    bytes over measured copy bandwidth, or operations over measured peak
    ours     the plugin's layer
    padded   stock vLLM on whole blocks: the span of the rank's columns
    refined  stock vLLM with scale blocks small enough to cut (0.29 and later)
    half_tp  stock vLLM at half the TP size, if that cuts no block
    ep       stock vLLM with whole experts on as many GPUs, worst-loaded rank
    deep_gemm  as padded, with DeepGEMM; only if asked for: it compiles at first use

A graph holds eight routings in rotation, and copies of the layer if one fits into
the L2 cache; a time is the median of its replays, divided by its calls.

``--check-only`` checks more instead: every rank, odd ones first, and a routing that
leaves most experts without tokens.

``--no-compile`` calls ours with the most tokens first, as an engine starts, and then
with 1, 2, 3 and so on, while vLLM's monitor makes an error of each compilation.

``--cpu-time`` times calls on the CPU instead, which waits for nothing, in microseconds.

Exits with 1 if ours is farther from an fp32 reference that rounds where it rounds than
TOLERATED_ERROR in 128 columns or TOLERATED_TOKEN in a token's row, if a replayed graph
of it differs from a call in a single bit, or if a layer fails that stock does not
refuse. PASS and MISS compare times with the bars.
"""

import argparse
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import torch

from benchmarks import graph_timing
from benchmarks.device_limits import Limits
from benchmarks.moe_cases import CASES, Case
from benchmarks.moe_layers import Implementation, Layer, Routing, implementations
from benchmarks.quantized import normal
from benchmarks.run import Run, chosen, first_line, parsed, parser_of, started
from vllm_patch.cli.tune.errors import worst_columns, worst_token

# Of 128 columns, over 64 tokens or more: bfloat16 rounds pairs' outputs and their sum
# by up to 2**-9 each. Tensor cores add FP8 products in 14 bits, which makes about one
# code in 300 of the intermediate its neighbour, about 2**-3.5 away: 2**-8 in all. A
# column too few of 320 is 2**-4.2.
TOLERATED_ERROR = 2**-6
# Of a token: a row can be little more than one value of the intermediate, and the
# neighbour of its code is up to 2**-3 away.
TOLERATED_TOKEN = 2**-3
# Fewer tokens are drawn again, so that one code does not decide.
AVERAGED_TOKENS = 64
NO_COMPILE_TOKENS = (16384,)
# Their kernels are launched faster than the GPU's queue fills: 10 at a time.
CPU_TIME_TOKENS = (16, 512, 2048)
CPU_CALLS = 30, 10
TIMED_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
CHECKED_TOKENS = (1, 2, 17, 64, 1000)
ROUTINGS = 8
# Weights between two uses of an expert, in L2 caches.
ROTATED_CACHES = 2
MAX_COPIES = 8
Draw = Callable[[Case, int, torch.Generator], Routing]
COLUMNS = ("ours", "padded", "refined", "half_tp", "ep", "deep_gemm")
RATIOS = ("padded/ours", "refined/ours", "ours/floor")
# For a case with bars: how many times faster ours is than stock, at any number of
# tokens and in geometric mean. In other cases it is not slower.
LEAST = {"padded/ours": (1.0, 1.25), "refined/ours": (1.2, 1.5)}
# Likewise, where bytes decide; with fewer tokens latency does.
MOST_OVER_FLOOR, AT_FLOOR = 1.4, range(16, 257)
# By number of tokens: microseconds by column, and ratios.
Table = dict[int, dict[str, float]]


@dataclass
class ExpertsRun(Run):
    """A run with columns; with limits, if it shall time them."""

    columns: Sequence[str] = COLUMNS
    limits: Limits | None = None


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    bounds = (
        f"{TOLERATED_ERROR:.2e} of 128 columns, {TOLERATED_TOKEN:.2e} of a token's row"
    )
    with started(args, bounds) as rows:
        run = ExpertsRun(
            args.device, args.tokens, rows, args.config, columns=args.columns
        )
        run.start(args.budget)
        _start_workspace(run.device)
        if args.no_compile:
            _check_compilations(run, chosen(CASES, args))
            return run.exit_status()
        if args.cpu_time:
            for case in chosen(CASES, args):
                _cpu_times(run, case)
            return run.exit_status()
        if not args.check_only:
            run.limits = _limits(run.device)
        for case in chosen(CASES, args):
            _run_case(run, case)
    return run.exit_status()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("moe", __doc__)
    add = parser.add_argument
    add("--columns", nargs="+", choices=COLUMNS, default=COLUMNS[:-1])
    add("--no-compile", action="store_true", help="nothing compiles after the start")
    add("--cpu-time", action="store_true", help="time calls on the CPU")
    add("--budget", type=float, default=540.0, help="seconds for the whole command")
    args = parsed(parser, argv)
    default = CHECKED_TOKENS if args.check_only else TIMED_TOKENS
    if args.no_compile:
        default = NO_COMPILE_TOKENS
    if args.cpu_time:
        default = CPU_TIME_TOKENS
    args.tokens = args.tokens or default
    return args


def _start_workspace(device: torch.device) -> None:
    from vllm.v1.worker import workspace

    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(device)


def _limits(device: torch.device) -> Limits:
    limits = Limits.measured(device)
    print(
        f"copy     {limits.bandwidth / 1e12:.2f} TB/s\n"
        f"fp8      {limits.fp8_flops / 1e12:.0f} TFLOP/s"
    )
    return limits


def _run_case(run: Run, case: Case) -> None:
    shard = case.shard
    print(
        f"\n{case.name}: {case.experts} experts, top-{case.top_k}, hidden "
        f"{case.hidden}, {case.total} / {case.tp_size} = {shard.size} columns\n"
        f"  {case.why}\n"
        f"  timed: rank {case.rank}, lead {shard.lead}, span {shard.span}",
        flush=True,
    )
    if run.is_late_for(case.name):
        return
    able = _check(run, case)
    if run.limits is not None and able:
        _time(run, case, able)


# -- correctness --------------------------------------------------------------


def _check(run: Run, case: Case) -> dict[str, Implementation]:
    """Compare each column with its reference; return those that can be timed."""
    able = {}
    for name, what in implementations(case).items():
        if name not in run.columns:
            continue
        if what is None:
            print(f"  {name:8} -, half the ranks cut quant blocks too")
            continue
        try:
            errors, note = _errors(run, case, name, what)
        except Exception as error:  # Layers and kernels raise what they like.
            _refuse(run, case, name, error)
            continue
        columns, token = map(max, zip(*errors.values(), strict=True))
        print(
            f"  {name:8} error of 128 columns {columns:.2e}, of a token {token:.2e}  "
            f"{note}",
            flush=True,
        )
        able[name] = what
        run.checked += 1
        _judge(run, case, name, errors)
    return able


def _refuse(run: Run, case: Case, name: str, error: Exception) -> None:
    refusals = ValueError, NotImplementedError
    if name in ("refined", "deep_gemm") and isinstance(error, refusals):
        print(f"  {name:8} refuses: {first_line(error)}", flush=True)
    else:
        run.problem(f"{case.name}, {name}: {first_line(error)}")


Errors = dict[str, tuple[float, float]]  # By kind of call: 128 columns, a token.


def _judge(run: Run, case: Case, name: str, errors: Errors) -> None:
    """Of stock's errors, only NaN is a problem of this command."""
    limits = (TOLERATED_ERROR, TOLERATED_TOKEN) if name == "ours" else (math.inf,) * 2
    for call, (columns, token) in errors.items():
        # NaN is no number below a limit.
        if not (columns < limits[0] and token < limits[1]):
            run.problem(
                f"{case.name}, {name}, {call}: error of 128 columns {columns:.2e}, "
                f"of a token {token:.2e}"
            )


def _errors(
    run: Run, case: Case, name: str, what: Implementation
) -> tuple[Errors, str]:
    """Return the errors by kind of call, and a note."""
    ranks, routings = [what.rank], [Routing.random]
    if run.limits is None:
        routings.append(Routing.skewed)
        if name == "ours":
            ranks = sorted(range(case.tp_size), key=lambda rank: rank % 2 == 0)
    errors: Errors = {}
    note = ""
    for rank in ranks:
        ours = replace(what, rank=rank)
        layer = Layer(case, ours, rank, run.device, run.checkpoint)
        if rank == what.rank:
            size = f"{layer.weights.nbytes / 1e6:.1f} MB of weights"
            note = f"{layer.kernel}, {size}, activation scales {layer.arithmetic}"
        for tokens, draw in itertools.product(run.tokens, routings):
            call = f"rank {rank}, {tokens} tokens, {draw.__name__} routing"
            errors[call] = _error(run, case, layer, tokens, draw)
            if name == "ours" and run.device.type == "cuda":
                _check_replay(run, case, layer, tokens, draw, call)
    return errors, note


def _error(
    run: Run, case: Case, layer: Layer, tokens: int, draw: Draw
) -> tuple[float, float]:
    values, expected = [], []
    for seed in range(math.ceil(AVERAGED_TOKENS / tokens)):
        x, (routing,) = _inputs(run, case, tokens, count=1, seed=seed, routing=draw)
        routing = layer.what.route(case, routing)
        values.append(_value(layer, x, routing))
        expected.append(layer.reference(x, routing))
    pair = torch.cat(values), torch.cat(expected)
    return worst_columns(*pair), worst_token(*pair)


def _value(layer: Layer, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    with layer.rank(), torch.inference_mode():
        layer(x, routing)
        _poison_workspaces()
        return layer(x, routing).clone()


def _check_replay(
    run: Run, case: Case, layer: Layer, tokens: int, draw: Draw, call: str
) -> None:
    """Compare a graph's replays with calls, on inputs that change in place."""
    x, (routing,) = _inputs(run, case, tokens, count=1, routing=draw)

    def change(seed: int) -> None:
        other, (there,) = _inputs(run, case, tokens, 1, seed, draw)
        x.copy_(other)
        routing.weights.copy_(there.weights)
        routing.ids.copy_(there.ids)
        _poison_workspaces()

    with layer.rank(), torch.inference_mode():
        if not graph_timing.replays_alike(lambda: layer(x, routing), change):
            run.problem(f"{case.name}, {call}: a replay differs from the call")


def _poison_workspaces() -> None:
    """Fill vLLM's scratch memory with NaN: what was there must not count."""
    from vllm.v1.worker.workspace import current_workspace_manager

    for workspace in current_workspace_manager()._current_workspaces:
        if workspace is not None:
            workspace.view(torch.uint8).fill_(0xFF)


def _inputs(
    run: Run,
    case: Case,
    tokens: int,
    count: int,
    seed: int = 0,
    routing: Draw = Routing.random,
) -> tuple[torch.Tensor, list[Routing]]:
    generator = torch.Generator(run.device).manual_seed(tokens + (seed << 20))
    x = normal(tokens, case.hidden, generator=generator, dtype=torch.bfloat16)
    return x, [routing(case, tokens, generator) for _ in range(count)]


# -- compilation --------------------------------------------------------------


def _check_compilations(run: Run, cases: list[Case]) -> None:
    """Start all layers, then call them with any number of tokens up to the most."""
    from vllm.utils import jit_monitor

    calls = {case.name: _started(run, case) for case in cases}
    jit_monitor.activate(mode="error")
    for name, call in calls.items():
        for tokens in range(1, max(run.tokens) + 1):
            if error := _compilation(call, tokens):
                run.problem(f"{name}, {tokens} tokens: {error}")
        if not _compilation(call, 1, ids=torch.int64):
            run.problem(f"{name}: the monitor missed the kernels for other ids")
        run.checked += 1


def _started(run: Run, case: Case) -> Callable[..., torch.Tensor]:
    """Return a layer's calls by tokens and dtype of ids, after one of the most."""
    layer = Layer(case, implementations(case)["ours"], seed=0, device=run.device)
    most = max(run.tokens)
    x, (routing,) = _inputs(run, case, most, count=1)

    def call(tokens: int, ids: torch.dtype = torch.int32) -> torch.Tensor:
        routed = Routing(routing.weights[:tokens], routing.ids[:tokens].to(ids))
        with layer.rank(), torch.inference_mode():
            return layer(x[:tokens], routed)

    started = monotonic()
    call(most)
    seconds = monotonic() - started
    print(f"{case.name}: first call, {most} tokens, {seconds:.1f} s", flush=True)
    return call


def _compilation(call: Callable[..., torch.Tensor], *args, **kwargs) -> str | None:
    """Return what a call compiles first, or None."""
    try:
        call(*args, **kwargs)
    except RuntimeError as error:
        return first_line(error)
    return None


# -- the CPU's time -----------------------------------------------------------


def _cpu_times(run: Run, case: Case) -> None:
    """Print how long a call takes the CPU, by column and number of tokens."""
    print(f"\n{case.name}: microseconds of the CPU, by tokens")
    for name, what in implementations(case).items():
        if name not in run.columns or what is None:
            continue
        try:
            layer = Layer(case, what, 0, run.device, run.checkpoint)
        except Exception as error:  # Layers raise what they like.
            _refuse(run, case, name, error)
            continue
        times = {tokens: _cpu_us(run, case, layer, tokens) for tokens in run.tokens}
        cells = (f"{tokens}: {time:.1f}" for tokens, time in times.items())
        print(f"  {name:8} {', '.join(cells)}", flush=True)
        run.checked += 1


def _cpu_us(run: Run, case: Case, layer: Layer, tokens: int) -> float:
    """Return the median of calls that the GPU has caught up with."""
    x, (routing,) = _inputs(run, case, tokens, count=1)
    routed, times = layer.what.route(case, routing), []
    turns, calls = CPU_CALLS
    with layer.rank(), torch.inference_mode():
        for turn in range(1 + turns):
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            for _ in range(calls):
                started = monotonic()
                layer(x, routed)
                times += [monotonic() - started] * (turn > 0)
    return 1e6 * statistics.median(times)


# -- time ---------------------------------------------------------------------


def _time(run: Run, case: Case, able: dict[str, Implementation]) -> None:
    """Print a row for each number of tokens, then what they amount to."""
    copies = max(_copies(run, case, tokens) for tokens in run.tokens)
    layers = {
        name: [
            Layer(case, what, seed, run.device, run.checkpoint)
            for seed in range(copies)
        ]
        for name, what in able.items()
    }
    _print_cells("tokens", ["floor", *COLUMNS, *RATIOS])
    table: Table = {}
    for tokens in run.tokens:
        if run.is_late_for(f"{case.name}, {tokens} tokens"):
            break
        table[tokens] = _row(run, case, layers, tokens)
        _print_row(str(tokens), table[tokens])
        _record(run, case, layers, tokens, table[tokens])
    _summarize(run, case, table)


def _row(run: Run, case: Case, layers: dict[str, list[Layer]], tokens: int):
    """Return microseconds by column, and ratios."""
    x, routings = _inputs(run, case, tokens, ROUTINGS)
    copies = _copies(run, case, tokens)
    calls = {}
    for name, twins in layers.items():
        try:
            calls[name] = _calls(case, twins[:copies], x, routings)
        except Exception as error:  # The other columns shall run.
            run.problem(f"{case.name}, {tokens} tokens, {name}: {first_line(error)}")
    # Only now is the shared workspace as large as any column needs: graphs keep
    # its address.
    graphs = []
    for name, each in calls.items():
        with layers[name][0].rank(), torch.inference_mode():
            graphs.append(graph_timing.capture(each))
    times = graph_timing.microseconds(graphs)
    floor = statistics.mean(_floor_us(run, case, tokens, r) for r in routings)
    row = {"floor": floor}
    for (name, each), time in zip(calls.items(), times, strict=True):
        row[name] = time / len(each)
    return {**row, **_ratios(row)}


def _ratios(row: dict[str, float]) -> dict[str, float]:
    pairs = {name: name.split("/") for name in RATIOS}
    return {
        name: row[above] / row[below]
        for name, (above, below) in pairs.items()
        if above in row and below in row
    }


def _calls(case: Case, twins: list[Layer], x: torch.Tensor, routings: list[Routing]):
    """Return a graph's calls, after a first one of each layer."""
    routed = [twins[0].what.route(case, routing) for routing in routings]
    for twin in twins:
        with twin.rank(), torch.inference_mode():
            twin(x, routed[0])
    return [functools.partial(twin, x, r) for twin in twins for r in routed]


def _copies(run: Run, case: Case, tokens: int) -> int:
    """Return how many layers' routed experts are more than the L2 cache holds."""
    _, routings = _inputs(run, case, tokens, ROUTINGS)
    experts = torch.cat([routing.ids.flatten() for routing in routings]).unique()
    rotated = len(experts) * case.expert_bytes
    needed = ROTATED_CACHES * run.limits.l2_bytes
    return min(MAX_COPIES, max(1, math.ceil(needed / rotated)))


def _floor_us(run: Run, case: Case, tokens: int, routing: Routing) -> float:
    """Return the time to read routed experts and activations once, or to multiply."""
    weights = len(routing.ids.unique()) * case.expert_bytes
    activations = 2 * tokens * case.hidden * torch.bfloat16.itemsize
    flops = 2 * routing.ids.numel() * 3 * case.shard.size * case.hidden
    return run.limits.floor_us(weights + activations, flops)


# -- report -------------------------------------------------------------------


def _print_row(label: str, row: dict[str, float]) -> None:
    cells = [row.get(name) for name in ("floor", *COLUMNS, *RATIOS)]
    _print_cells(label, ["-" if cell is None else f"{cell:.2f}" for cell in cells])


def _print_cells(label: str, cells: list[str]) -> None:
    columns = 1 + len(COLUMNS)
    widths = [10] * columns + [13] * (len(cells) - columns)
    row = "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
    print(f"  {label:>8}{row}", flush=True)


def _summarize(run: Run, case: Case, table: Table) -> None:
    """Print means, and whether the ratios keep to the bars."""
    if not table:
        return
    means = {
        name: statistics.geometric_mean(row[name] for row in table.values())
        for name in set.intersection(*map(set, table.values()))
    }
    _print_row("geomean", means)
    for name, (each, mean) in LEAST.items():
        run.bar(name, _column(table, name), each if case.has_bars else 1.0)
        if case.has_bars and name in means:
            run.bar(name, {"geometric mean": means[name]}, mean)
    if case.has_bars:
        over = _column({t: row for t, row in table.items() if t in AT_FLOOR}, RATIOS[2])
        run.bar(RATIOS[2], over, MOST_OVER_FLOOR, most=True)


def _column(table: Table, name: str) -> dict[str, float]:
    return {f"{t} tokens": row[name] for t, row in table.items() if name in row}


def _record(run, case: Case, layers, tokens: int, row: dict[str, float]) -> None:
    sizes = ("experts", "top_k", "hidden", "total", "tp_size", "rank")
    for name, twins in layers.items():
        if name not in row:
            continue
        weights = twins[0].weights
        run.rows.add(
            {
                "case": case.name,
                **{size: getattr(case, size) for size in sizes},
                "columns": case.shard.size,
                "tokens": tokens,
                "implementation": name,
                "kernel": twins[0].kernel,
                "stored_columns": weights.w2.shape[-1],
                "block": weights.block,
                "activation_scales": twins[0].arithmetic,
                "weight_bytes": weights.nbytes,
                "us": f"{row[name]:.3f}",
                "floor_us": f"{row['floor']:.3f}",
                "copy_tb_s": f"{run.limits.bandwidth / 1e12:.3f}",
                "fp8_tflop_s": f"{run.limits.fp8_flops / 1e12:.0f}",
            }
        )


if __name__ == "__main__":
    sys.exit(main())
