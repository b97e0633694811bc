"""Padded block-FP8 linear layers against stock ones of the next aligned size.

``python -m benchmarks.linear`` runs every kernel that vLLM has for block-FP8 linear
layers on this GPU. For each one it first checks all ranks against an fp32 reference
and then times CUDA graphs of one straddling rank. The control, in the same run, is
stock vLLM's layer whose shards are rounded up to whole blocks.

A layer is timed as it is called without torch.compile and, if column-parallel, once
more compiled, as an engine compiles it by default, with SiLU-and-multiply or the rotary
embedding after it, for ours and for stock (by torch.compile, without vLLM's passes).

Exits with 1 if a padded layer is farther than TOLERATED_ERROR from an fp32 reference
that rounds where vLLM's kernel rounds, in a token's row or in 128 columns; if a graph
of it, replayed, differs from a call in a single bit, or it computes something else
compiled than alone; if it does not run where the control does; or if a layer that needs
no padding launches other kernels with the plugin than without it. PASS and MISS compare
times with MOST, for each kernel.
"""

import argparse
import copy
import functools
import math
import os
import sys
from collections.abc import Callable
from unittest import mock

import torch

from benchmarks import graph_timing, linear_in_model
from benchmarks.linear_cases import CASES, Case, Quantized, kernel_of, method_of
from benchmarks.linear_reference import Arithmetic, expected, of_fp8_values
from benchmarks.one_rank import rank_of
from benchmarks.quantized import (
    BLOCK,
    normal,
    relative_error,
    round_up,
)
from benchmarks.run import Run, chosen, first_line, parsed, parser_of, started
from vllm_patch import plugin
from vllm_patch.cli.tune.errors import worst_columns, worst_token

# bfloat16 rounds outputs by up to 2**-9, and tensor cores add FP8 products in 14 bits.
# One wrong column of 128 is 2**-3.5, one that is missing of an input of 2432 2**-5.6.
TOLERATED_ERROR = 2**-7
# bfloat16 is rounded in other places.
COMPILED_ERROR = 0.02
# Beyond this, stock itself is wrong, and no measure.
SANE_ERROR = 0.1
CHECKED_TOKENS = (1, 17)
# Weights in rotation: three times the 60 MB of an H200's L2, so none stays in it.
ROTATED_BYTES = 180e6
MAX_COPIES = 256
TOKENS = (1, 16, 256, 4096)
# Of the time that stock takes for the next aligned size: as an engine compiles layers
# by default, and with --enforce-eager, where taking columns is a launch of its own.
MOST = {"compiled": 1.10, "eager": 1.25}
ROW_FORMAT = (
    "  {layer:26} {sizes:>13} -> {padded:>13} stock {stock:>13} {how:8} {tokens:5} "
    "tokens {padded_us:>8} us {stock_us:>8} us {ratio:>6} "
    "launches {padded_launches} / {stock_launches}"
)
# How a layer was timed, layer and tokens -> time over stock's.
Ratios = dict[str, dict[str, float]]


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    bounds = f"{TOLERATED_ERROR:.2e} of a token's row and of 128 columns"
    with started(args, bounds) as rows:
        # An engine's first call has the most tokens, and Inductor tunes by the first.
        tokens = sorted(args.tokens or TOKENS, reverse=True)
        run = Run(args.device, tokens, rows, args.config)
        cases = chosen(CASES, args)
        for case in cases:
            print(f"vLLM chooses {_choice(run, case)} for {case.name}")
        for name in args.backends or _backends():
            run.start(args.budget)
            with _only(name):
                _run_backend(run, name, cases, timed=not args.check_only)
    return run.exit_status()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("linear", __doc__)
    add = parser.add_argument
    add("--backends", nargs="+", help="kernel classes (default: all that vLLM has)")
    add("--budget", type=float, default=180.0, help="seconds for one kernel class")
    return parsed(parser, argv)


def _backends() -> list[str]:
    """Return vLLM's kernels for block-FP8 linear layers, in its order of preference."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import current_platform

    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS[current_platform._enum]
    return [kernel.__name__ for kernel in kernels]


def _choice(run: Run, case: Case) -> str:
    layer = case.build(_timed_rank(case), run.device, run.checkpoint)
    return type(kernel_of(layer)).__name__


def _only(name: str):
    others = ",".join(other for other in _backends() if other != name)
    return mock.patch.dict(os.environ, VLLM_DISABLED_KERNELS=others)


def _run_backend(run: Run, name: str, cases: list[Case], timed: bool) -> None:
    print(f"\n{name}", flush=True)
    reason = _reason_against(run, name, cases[0])
    if reason:
        print(f"  not available: {reason}")
        return
    checked = [case for case in cases if _check(run, name, case)]
    run.checked += len(checked)
    if not timed:
        return
    ratios: Ratios = {how: {} for how in MOST}
    for case in checked:
        try:
            _time(run, name, case, ratios)
        except Exception as error:  # The other layers shall run.
            run.problem(f"{name}, {case.name}: {first_line(error)}")
    for how, most in MOST.items():
        run.bar(f"{how}, over stock of the next aligned size", ratios[how], most, True)


def _reason_against(run: Run, name: str, case: Case) -> str | None:
    """Return why vLLM cannot use the kernel here, or None."""
    try:
        case.aligned().build(0, run.device, run.checkpoint)
    except ValueError as error:
        # vLLM lists a reason for each kernel; without one they are not about kernels.
        reasons = [line for line in str(error).splitlines() if name in line]
        return reasons[0].strip() if reasons else str(error)
    return None


# -- correctness --------------------------------------------------------------


def _check(run: Run, backend: str, case: Case) -> bool:
    """Compare all ranks, odd ones first, with the control; say whether to go on."""
    if run.is_late_for(f"{backend}, {case.name}"):
        return False
    try:
        stock, _ = _worst_error(run, case.aligned())
    except Exception as error:  # Kernels raise what they like.
        print(f"  {case.name:26} stock fails: {first_line(error)}", flush=True)
        return False
    if not stock < SANE_ERROR:
        print(f"  {case.name:26} stock is wrong: error {stock:.2e}", flush=True)
        return False
    try:
        ours, arithmetic = _worst_error(run, case)
    except Exception as error:
        run.problem(f"{backend}, {case.name}: {first_line(error)}")
        return False
    print(
        f"  {case.name:26} error at most {ours:.2e}, stock {stock:.2e}, activation "
        f"scales {arithmetic}",
        flush=True,
    )
    if not ours < TOLERATED_ERROR:
        run.problem(f"{backend}, {case.name}: error {ours:.2e}")
        return False
    return True


def _worst_error(run: Run, case: Case) -> tuple[float, Arithmetic]:
    """Return the largest error of all ranks, and what it was measured by.

    One rank also runs each number of tokens that is timed.
    """
    tensors = case.tensors(run.device)
    errors = []
    for rank in sorted(range(case.tp_size), key=lambda rank: rank % 2 == 0):
        layer = _loaded(run, case, tensors, rank)
        counts = run.tokens if rank == _timed_rank(case) else []
        for tokens in {*CHECKED_TOKENS, *counts}:
            x = _activations(run, case, rank, tokens, layer)
            errors.append(_error(case, layer, tensors, rank, x))
            on_gpu = run.device.type == "cuda"
            if on_gpu and rank == _timed_rank(case) and _is_padded(layer):
                _check_replay(run, case, layer, rank, x)
    return max(errors), Arithmetic.of(layer)


def _check_replay(run: Run, case: Case, layer, rank: int, x: torch.Tensor) -> None:
    """Compare a graph's replays with calls, on activations that change in place."""

    def change(seed: int) -> None:
        x.copy_(_activations(run, case, rank, len(x), layer, seed))

    with rank_of(case.tp_size, rank), torch.inference_mode():
        if not graph_timing.replays_alike(lambda: layer(x)[0], change):
            run.problem(f"{case.name}, {len(x)} tokens: a replay differs from the call")


def _error(case, layer, tensors: list[Quantized], rank: int, x: torch.Tensor) -> float:
    with rank_of(case.tp_size, rank), torch.inference_mode():
        value = layer(x)[0]
    reference = expected(case, tensors, rank, x, Arithmetic.of(layer))
    errors = worst_token(value, reference), worst_columns(value, reference)
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _loaded(run: Run, case: Case, tensors: list[Quantized], rank: int):
    layer = case.build(rank, run.device, run.checkpoint)
    case.load(layer, tensors, rank, run.checkpoint)
    is_cut = any(part.size % BLOCK for part in case.parts(rank))
    assert _is_padded(layer) == is_cut, case
    return layer


def _is_padded(layer: torch.nn.Module) -> bool:
    return hasattr(method_of(layer), "layout")


def _activations(run: Run, case: Case, rank: int, tokens: int, layer, seed: int = 0):
    part = case.parts(rank)[0]
    size = part.size if case.is_row else case.whole
    generator = torch.Generator(run.device).manual_seed(rank + (seed << 20))
    x = normal(tokens, size, generator=generator, dtype=torch.bfloat16)
    # FlashInfer's kernel quantizes by itself, and may round what others round up.
    if getattr(kernel_of(layer), "apply_input_quant", True):
        return x
    return of_fp8_values(x, part.lead if case.is_row else 0)


# -- time ---------------------------------------------------------------------


def _time(run: Run, backend: str, case: Case, ratios: Ratios) -> None:
    """Print a row for each number of tokens, and add to ``ratios``."""
    rank = _timed_rank(case)
    padded = _Timed(run, case, rank)
    stock = _Timed(run, case.aligned(), rank, after=case)
    _compare_aligned(run, backend, case.aligned(), rank, stock)
    if not case.is_row:
        _compare_compiled(run, backend, padded)
    for tokens in run.tokens:
        if run.is_late_for(f"{backend}, {case.name}, {tokens} tokens"):
            return
        for how in ("eager",) if case.is_row else MOST:
            padded.how = stock.how = how
            row = {"backend": backend, **_sizes(case, rank)}
            row.update(_times(padded, stock, tokens))
            print(ROW_FORMAT.format(**row), flush=True)
            run.rows.add(row)
            ratios[how][f"{case.name}, {tokens} tokens"] = float(row["ratio"])


def _times(padded: "_Timed", stock: "_Timed", tokens: int) -> dict[str, object]:
    times = graph_timing.microseconds([padded.graph(tokens), stock.graph(tokens)])
    ours, theirs = (t / w.copies for t, w in zip(times, (padded, stock), strict=True))
    return {
        "how": padded.how,
        "tokens": tokens,
        "activation_scales": padded.arithmetic,
        "padded_us": f"{ours:.3f}",
        "stock_us": f"{theirs:.3f}",
        "ratio": f"{ours / theirs:.3f}",
        "padded_launches": len(padded.launches(tokens)),
        "stock_launches": len(stock.launches(tokens)),
    }


def _sizes(case: Case, rank: int) -> dict[str, object]:
    parts = case.parts(rank)
    return {
        "layer": case.name,
        "rank": rank,
        "sizes": "+".join(str(part.size) for part in parts),
        "padded": "+".join(str(part.span) for part in parts),
        "stock": "+".join(str(round_up(part.size)) for part in parts),
    }


class _Timed:
    """Copies of one rank's layer, enough not to be served from the L2 cache.

    Args:
        run: The command's.
        case: The layer, or its control.
        rank: The rank.
        after: The layer whose output is used; by default ``case``.

    Attributes:
        how: ``eager``, as without torch.compile, or ``compiled``, together with what
            uses the output.

    """

    def __init__(self, run: Run, case: Case, rank: int, after: Case | None = None):
        self.run, self.case, self.rank, self.how = run, case, rank, "eager"
        layer = _loaded(run, case, case.tensors(run.device), rank)
        self.arithmetic = Arithmetic.of(layer)
        size = sum(param.nbytes for param in layer.parameters())
        self.copies = min(MAX_COPIES, max(4, round(ROTATED_BYTES / size)))
        self.layers = [layer, *(_copy(layer) for _ in range(self.copies - 1))]
        # A graph reads its input where it was captured, so inputs must stay.
        self.inputs: dict[int, torch.Tensor] = {}
        self.forward = linear_in_model.forward(after or case, layer)
        self.compiled = linear_in_model.compiled(self.forward)

    def calls(self, tokens: int) -> list[Callable]:
        if tokens not in self.inputs:
            x = _activations(self.run, self.case, self.rank, tokens, self.layers[0])
            if tokens > 1:
                torch._dynamo.mark_dynamic(x, 0)
            self.inputs[tokens] = x
        x = self.inputs[tokens]
        if self.how == "eager":
            return [functools.partial(layer, x) for layer in self.layers]
        return [
            functools.partial(self.compiled, x, linear_in_model.parameters(layer))
            for layer in self.layers
        ]

    def outputs(self, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what one layer and its consumer make, alone and compiled."""
        weights = linear_in_model.parameters(self.layers[0])
        self.calls(tokens)
        x = self.inputs[tokens]
        with rank_of(self.case.tp_size, self.rank), torch.inference_mode():
            return list(
                zip(self.forward(x, weights), self.compiled(x, weights), strict=True)
            )

    def graph(self, tokens: int) -> torch.cuda.CUDAGraph:
        with rank_of(self.case.tp_size, self.rank), torch.inference_mode():
            return graph_timing.capture(self.calls(tokens))

    def launches(self, tokens: int) -> list[str]:
        with rank_of(self.case.tp_size, self.rank), torch.inference_mode():
            return graph_timing.launches(self.calls(tokens)[0])


def _copy(layer: torch.nn.Module) -> torch.nn.Module:
    """Return a layer with weights of its own that shares the rest."""
    twin = copy.copy(layer)
    twin._parameters = {
        name: None
        if param is None
        else torch.nn.Parameter(param.data.clone(), requires_grad=False)
        for name, param in layer._parameters.items()
    }
    return twin


def _compare_aligned(run, backend: str, case: Case, rank: int, with_plugin) -> None:
    """Check that the plugin changes no launch of a layer that needs no padding."""
    plugin.unregister()
    try:
        stock = _Timed(run, case, rank).launches(run.tokens[0])
    finally:
        plugin.register()
    ours = with_plugin.launches(run.tokens[0])
    if ours != stock:
        run.problem(f"{backend}, {case.name}: launches {ours}, without plugin {stock}")


def _compare_compiled(run: Run, backend: str, timed: _Timed) -> None:
    """Check that a compiled call computes what the layer alone does."""
    for tokens in run.tokens:
        for alone, compiled in timed.outputs(tokens):
            error = relative_error(compiled, alone.float())
            if not error <= COMPILED_ERROR:
                run.problem(
                    f"{backend}, {timed.case.name}, {tokens} tokens: compiled, it "
                    f"differs by {error:.2e}"
                )


def _timed_rank(case: Case) -> int:
    """Return the first straddling rank among those with the largest padded shards."""
    ranks = range(case.tp_size)
    return max(
        ranks,
        key=lambda rank: (
            sum(part.span for part in case.parts(rank)),
            any(part.lead for part in case.parts(rank)),
            -rank,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
