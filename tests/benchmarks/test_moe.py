"""The check that stands before the timings of experts, and what is made of them."""

import csv
import io
import math
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import moe, moe_layers
from benchmarks.device_limits import Limits
from benchmarks.moe_cases import Case
from benchmarks.moe_layers import Arithmetic, Layer, Routing, Weights
from benchmarks.quantized import FP8, random_scales
from benchmarks.run import Rows
from tests.formats.configs import FORMATS
from tests.fp8_tp_padding.moe_reference import ACTIVATIONS
from vllm_patch.cli.tune.errors import worst_columns, worst_token

# 192 columns per rank, the second one from half a block on. With one block of hidden
# columns, scales would make a rank's first block count next to nothing.
CASE = Case("tiny", 4, 2, 256, 384, 2, why="small")


@pytest.fixture
def check(monkeypatch, plugin):
    """Return the command for a case that a CPU can run, of tokens that it has time for.

    Sorted: eight tokens are four pairs for each expert.
    """
    monkeypatch.setattr(moe, "CASES", [CASE])
    monkeypatch.setattr(moe, "AVERAGED_TOKENS", 8)
    arguments = ["--check-only", "--columns", "ours", "padded", "--tokens"]
    return lambda tokens=8, *options: moe.main([*arguments, str(tokens), *options])


@pytest.mark.parametrize("tokens", [1, 64])
def test_the_plugins_layer_passes(check, monkeypatch, tokens):
    """Pair by pair, and sorted."""
    monkeypatch.setattr(moe, "AVERAGED_TOKENS", 2)
    assert check(tokens) == 0


@pytest.mark.parametrize(
    "what", [{"activation": "gelu_tanh"}, {"swiglu_limit": 1.0}], ids=str
)
def test_an_activation_passes_and_another_does_not(check, monkeypatch, what):
    monkeypatch.setattr(moe, "CASES", [replace(CASE, **what)])
    assert check(8, "--columns", "ours") == 0
    make = moe_layers._routed_experts
    monkeypatch.setattr(moe_layers, "_routed_experts", lambda _, *a: make(CASE, *a))
    assert check(8, "--columns", "ours") == 1


@pytest.mark.parametrize("name", ["silu", "clamped", "swiglustep", "gelu_tanh"])
def test_the_reference_activates_as_vllm_does(name):
    activation = ACTIVATIONS[name]
    gate, up = 9 * torch.randn(2, 999, dtype=torch.float64)
    factors = Arithmetic.ours(replace(CASE, **activation.kwargs)).activated(gate, up)
    expected = activation.compute(torch.cat([gate, up]))
    torch.testing.assert_close(torch.mul(*factors), expected)


@pytest.mark.parametrize("name", ["compressed-tensors", "quark", "modelopt-mixed"])
def test_the_plugins_layer_passes_in_other_formats(check, name):
    if not FORMATS[name].is_in_release:
        pytest.skip(f"this release has no {name} in FP8 blocks")
    config = str(FORMATS[name].path)
    assert check(8, "--config", config) == 0


def flipped_scales(experts, loaded):
    scale = experts.w2_weight_scale_inv.data
    scale.copy_(scale.flip(-1))


def columns_from_one_further_on(experts, loaded):
    experts.w2_weight.data.copy_(loaded.w2.roll(1, -1))


@pytest.mark.parametrize("change", [flipped_scales, columns_from_one_further_on])
def test_what_is_loaded_wrong_does_not_pass(check, monkeypatch, capsys, change):
    """The reference is cut out of the checkpoint, and not of what was loaded."""
    stock_load = moe_layers._load

    def load(case, experts, *args):
        weights = stock_load(case, experts, *args)
        change(experts, weights)
        return weights

    monkeypatch.setattr(moe_layers, "_load", load)
    assert check(8, "--columns", "ours") == 1
    assert "random routing: error of 128 columns" in capsys.readouterr().out


def test_one_wrong_rank_does_not_pass(check, monkeypatch, capsys):
    """In one column of one token, with one of two routings."""
    stock_value, calls = moe._value, []

    def one_is_wrong(layer, x, routing):
        value = stock_value(layer, x, routing).clone()
        calls.append(not layer.what.is_stock and layer.what.rank == 1)
        if calls[-1] and calls.count(True) == 2:  # The skewed routing.
            value[5, 3] += value[5].abs().max()
        return value

    monkeypatch.setattr(moe, "_value", one_is_wrong)
    assert check(8, "--columns", "ours") == 1
    problems = capsys.readouterr().out.partition("PROBLEM: ")[2]
    assert "rank 1, 8 tokens, skewed routing: error" in problems.splitlines()[0]


def test_stock_is_measured_by_what_it_rounds(check, monkeypatch, capsys):
    """With DeepGEMM on, vLLM rounds the scales of activations to powers of two."""
    from vllm.model_executor.layers.fused_moe.experts import triton_moe
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    assert check(8, "--columns", "padded") == 0
    assert "activation scales exact" in capsys.readouterr().out
    for module in (fp8_utils, triton_moe):
        monkeypatch.setattr(
            module, "is_deep_gemm_e8m0_used", lambda: True, raising=False
        )
    assert check(8, "--columns", "padded") == 0
    stock = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "activation scales powers of two" in line
    ]
    assert len(stock) == 1 and stock[0].split()[0] == "padded"
    assert "of 128 columns" in stock[0] and float(stock[0].split()[5][:-1]) < 2**-6


def test_no_case_does_not_pass(plugin):
    assert moe.main(["--check-only", "--cases", "no such model"]) == 1


def test_the_reference_counts_columns_from_the_lead():
    """A compact store with a lead is a whole-block one with zeros around it."""
    generator = torch.Generator().manual_seed(0)
    lead, size, span, hidden = 64, 150, 256, 256
    gate, up, down = (
        torch.randn(2, *shape, generator=generator).to(FP8)
        for shape in ((size, hidden), (size, hidden), (hidden, size))
    )
    scales = (
        random_scales(2, 4, 2, generator=generator),
        random_scales(2, 2, 2, generator=generator),
    )
    compact = Weights(torch.cat([gate, up], 1), down, *scales, lead=lead)
    rows, columns = (0, 0, lead, span - lead - size), (lead, span - lead - size)
    pad = torch.nn.functional.pad
    gate, up = (pad(w.float(), rows).to(FP8) for w in (gate, up))
    down = pad(down.float(), columns).to(FP8)
    whole = Weights(torch.cat([gate, up], 1), down, *scales, lead=0)
    x = torch.randn(3, hidden, generator=generator)
    routing = Routing(
        torch.rand(3, 1, generator=generator), torch.tensor([[0], [1]] + [[1]])
    )
    rounding = Arithmetic.ours(CASE)
    expected = whole.reference(x, routing, rounding)
    # The same numbers and zeros, summed in another order: a code may flip.
    error = worst_token(compact.reference(x, routing, rounding), expected)
    assert error < 2**-3
    shifted = Weights(**{**vars(compact), "lead": 0})
    assert worst_token(shifted.reference(x, routing, rounding), expected) > 0.3


def test_the_worst_loaded_rank_comes_first():
    ids = torch.tensor([[0, 5], [4, 6], [7, 5]])
    routing = Routing(torch.ones(3, 2), ids).worst_rank_first(experts=8, ep_size=4)
    # Experts 4 and 5 have three pairs, and become 0 and 1.
    assert routing.ids.tolist() == [[4, 1], [0, 2], [3, 1]]


def a_run():
    return moe.ExpertsRun(torch.device("cpu"), [3], Rows(io.StringIO(), {}))


def test_rows_and_means(plugin, clock, capsys):
    file, columns = io.StringIO(), ["ours", "padded"]
    run = replace(a_run(), rows=Rows(file, {}), limits=Limits(1e12, 1e12, 1))
    moe._start_workspace(run.device)
    able = {name: moe_layers.implementations(CASE)[name] for name in columns}
    moe._time(run, CASE, able)
    header, tokens, means = capsys.readouterr().out.splitlines()[:3]
    assert header.split()[:2] == ["tokens", "floor"]
    # Eight calls a graph: 1 / 8 and 2 / 8.
    ratio = header.split().index("padded/ours")
    assert tokens.split()[2:4] == ["0.12", "0.25"] and tokens.split()[ratio] == "2.00"
    assert means.split()[ratio] == "2.00"
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [row["implementation"] for row in rows] == columns
    assert [row["stored_columns"] for row in rows] == ["192", "256"]


def test_bars_say_what_was_worst_and_where(capsys):
    rows = {
        1: {"floor": 10.0, "ours": 17.0, "padded": 27.0, "refined": 37.0},
        16: {"floor": 10.0, "ours": 15.0, "padded": 14.0, "refined": 20.0},
    }
    table = {tokens: {**row, **moe._ratios(row)} for tokens, row in rows.items()}
    run = a_run()
    moe._summarize(run, replace(CASE, has_bars=True), table)
    found = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "MISS padded/ours: 0.93 >= 1 (16 tokens)" in found
    assert "MISS padded/ours: 1.22 >= 1.25 (geometric mean)" in found
    assert "PASS refined/ours: 1.33 >= 1.2 (16 tokens)" in found
    assert "PASS refined/ours: 1.70 >= 1.5 (geometric mean)" in found
    assert "MISS ours/floor: 1.50 <= 1.4 (16 tokens)" in found
    moe._summarize(run, CASE, table)  # No slower than stock.
    assert "PASS refined/ours: 1.33 >= 1 (16 tokens)" in capsys.readouterr().out
    assert run.missed == 4 and not run.problems


def test_bars_leave_out_what_was_not_measured(capsys):
    table = {1: {"floor": 1.0, "padded": 2.0}}
    moe._summarize(a_run(), replace(CASE, has_bars=True), table)
    out = capsys.readouterr().out
    assert "geomean" in out and "PASS" not in out and "MISS" not in out


def test_a_replay_must_read_its_inputs_anew(plugin, replays_right):
    """And write all of its output."""
    run = a_run()
    moe._start_workspace(run.device)
    layer = Layer(CASE, moe_layers.implementations(CASE)["ours"], 0, run.device)
    moe._check_replay(run, CASE, layer, 3, Routing.random, "3 tokens")
    assert len(run.problems) == (0 if replays_right else 1)


@pytest.mark.parametrize("size", [(1, 128), (3, 320)])
def test_one_wrong_part_shows(size):
    expected = torch.full(size, 2.0)
    assert worst_columns(expected.bfloat16(), expected) == 0
    for part in [(slice(None), 5), (slice(None), slice(-64, None)), (0, slice(None))]:
        wrong = expected.clone()
        wrong[part] *= 1.5
        assert worst_columns(wrong, expected) > 0.04
    assert worst_token(wrong, expected) == 0.5
    wrong[0, 0] = float("nan")
    for worst in (worst_columns, worst_token):
        assert math.isnan(worst(wrong, expected))


def test_tokens_without_experts_must_be_zero():
    expected = torch.ones(2, 128)
    expected[1] = 0
    assert worst_token(expected, expected) == 0
    assert worst_token(expected + 1e-6, expected) > 1


@pytest.mark.parametrize("compiles", [(), (3,), (3, 5)])
def test_compilations_after_the_start(monkeypatch, plugin, capsys, compiles):
    """Each is a problem; so is a monitor that lets other kernels pass."""
    from vllm.utils import jit_monitor

    calls, active = [], []
    monkeypatch.setattr(jit_monitor, "activate", lambda mode: active.append(mode))

    def call(layer, x, routing):
        calls.append(len(x))
        is_other = routing.ids.dtype == torch.int64
        if active and (len(x) in compiles or is_other):
            raise RuntimeError("Triton kernel JIT compilation")

    monkeypatch.setattr(moe, "CASES", [CASE])
    monkeypatch.setattr(Layer, "__call__", call)
    arguments = ["--no-compile", "--check-only", "--tokens", "6"]
    assert moe.main(arguments) == bool(compiles)
    assert calls == [6, 1, 2, 3, 4, 5, 6, 1] and active == ["error"]
    out = capsys.readouterr().out
    assert out.count("PROBLEM") == len(compiles)
    for tokens in compiles:
        assert f"{tokens} tokens: RuntimeError: Triton kernel JIT" in out


def test_a_monitor_that_sees_nothing_is_a_problem(monkeypatch, plugin, capsys):
    from vllm.utils import jit_monitor

    monkeypatch.setattr(jit_monitor, "activate", lambda mode: None)
    monkeypatch.setattr(moe, "CASES", [CASE])
    assert moe.main(["--no-compile", "--check-only", "--tokens", "2"]) == 1
    assert "the monitor missed" in capsys.readouterr().out


def test_cpu_time_of_calls(monkeypatch, plugin, capsys):
    monkeypatch.setattr(moe, "CASES", [CASE])
    monkeypatch.setattr(moe, "CPU_CALLS", (1, 2))
    arguments = ["--cpu-time", "--check-only", "--tokens", "1", "2"]
    assert moe.main([*arguments, "--columns", "ours"]) == 0
    assert re.search(r"ours +1: [\d.]+, 2: [\d.]+\n", capsys.readouterr().out)
