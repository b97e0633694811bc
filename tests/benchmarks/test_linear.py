"""The check that stands before the timings of linear layers."""

import csv
import io

import pytest
import torch

from benchmarks import linear
from benchmarks.linear_cases import MERGED, QKV, ROW, Case, Quantized
from benchmarks.linear_reference import Arithmetic, of_fp8_values
from benchmarks.run import Rows
from tests.formats.configs import FORMATS

CASES = [
    # 96 per rank: the second one straddles two blocks.
    Case("gate_up", MERGED, 256, (384, 384), tp_size=4),
    Case("down", ROW, 256, (384,), tp_size=4),
    # Each KV head is on two ranks.
    Case("qkv", QKV, 256, (12, 2), tp_size=4),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def check(request, monkeypatch, plugin):
    """Return the command for one case on the kernel that runs on a CPU."""
    monkeypatch.setattr(linear, "CASES", [request.param])
    backend = "TritonFp8BlockScaledMMKernel"
    arguments = ["--check-only", "--tokens", "1", "--backends", backend]
    return lambda *options: linear.main([*arguments, *options])


def test_padded_layers_pass(check):
    assert check() == 0


@pytest.mark.parametrize("name", ["compressed-tensors", "quark", "modelopt", "inc"])
def test_padded_layers_of_other_formats_pass(check, name):
    if not FORMATS[name].is_in_release:
        pytest.skip(f"this release has no {name} in FP8 blocks")
    config = str(FORMATS[name].path)
    assert check("--config", config) == 0


def test_a_lead_of_zero_does_not_pass(check, monkeypatch, capsys):
    from vllm_patch.fp8_tp_padding.slices import linear_layout, shard

    def at_the_start(*args):
        right = shard.block_shard(*args)
        fields = {**vars(right), "lead": 0}
        return shard.BlockShard(**fields)

    monkeypatch.setattr(linear_layout, "block_shard", at_the_start)
    assert check() == 1
    assert "PROBLEM" in capsys.readouterr().out


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.name)
def test_compiled_layers_must_compute_the_same(plugin, monkeypatch, case):
    """With what follows: SiLU-and-multiply or the rotary embedding."""
    linear._backends()  # Imports what of vLLM is compiled when it is imported.
    trace = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: trace(f, backend="eager"))
    monkeypatch.setattr(linear, "ROTATED_BYTES", 1)
    run = linear.Run(torch.device("cpu"), [3], Rows(io.StringIO(), {}))
    with linear._only("TritonFp8BlockScaledMMKernel"):
        timed = linear._Timed(run, case, 1)
    linear._compare_compiled(run, "Triton", timed)
    assert not run.problems
    alone = timed.forward
    timed.compiled = lambda *args: tuple(y.flip(-1) for y in alone(*args))
    linear._compare_compiled(run, "Triton", timed)
    assert run.problems


def test_a_replay_must_read_its_input_anew(plugin, replays_right):
    run, case = linear.Run(torch.device("cpu"), [3], Rows(io.StringIO(), {})), CASES[0]
    with linear._only("TritonFp8BlockScaledMMKernel"):
        layer = linear._loaded(run, case, case.tensors(run.device), 1)
    x = linear._activations(run, case, 1, 3, layer)
    linear._check_replay(run, case, layer, 1, x)
    assert len(run.problems) == (0 if replays_right else 1)


def test_rows_and_bars(plugin, monkeypatch, clock, capsys):
    monkeypatch.setattr(linear.linear_in_model, "compiled", lambda call: call)
    monkeypatch.setattr(linear, "ROTATED_BYTES", 1)
    file, backend = io.StringIO(), "TritonFp8BlockScaledMMKernel"
    run = linear.Run(torch.device("cpu"), [3], Rows(file, {}))
    with linear._only(backend):
        linear._run_backend(run, backend, CASES[:1], timed=True)
    out = capsys.readouterr().out
    name = "over stock of the next aligned size"
    assert f"PASS compiled, {name}: 0.50 <= 1.1 (gate_up, 3 tokens)" in out
    assert f"PASS eager, {name}: 0.50 <= 1.25 (gate_up, 3 tokens)" in out
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [row["how"] for row in rows] == ["compiled", "eager"]
    assert rows[0]["sizes"] == "96+96" and rows[0]["stock"] == "128+128"
    assert not run.problems and not run.missed


def test_nothing_checked_does_not_pass(plugin):
    assert (
        linear.main(["--check-only", "--backends", "B12xFp8BlockScaledMMKernel"]) == 1
    )


@pytest.mark.parametrize("lead", [(0, 0), (64, 0), (0, 32)])
def test_the_reference_rounds_scales_as_vllm_does_for_deep_gemm(lead):
    """To powers of two, of what a rank holds of each block."""
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    generator = torch.Generator().manual_seed(0)
    # Whole blocks of the checkpoint, of which the rank has all but the lead.
    stored = Quantized.random(256, 384, generator)
    stored.weight[: lead[0]] = 0
    stored.weight[:, : lead[1]] = 0
    mine = stored.dequantized()[lead[0] :, lead[1] :]
    arithmetic = Arithmetic(quantizes=True, powers_of_two=True, bfloat16_scales=False)
    left = arithmetic.weights(mine, lead)
    assert not torch.equal(left, mine)
    fp8_utils.requant_weight_ue8m0_inplace(stored.weight, stored.scale)
    assert torch.equal(left, stored.dequantized()[lead[0] :, lead[1] :])


@pytest.mark.parametrize("lead", [0, 40])
def test_activations_that_no_quantization_rounds(lead):
    x = torch.randn(5, 200).bfloat16()
    exact = of_fp8_values(x, lead)
    assert exact.dtype == x.dtype and (exact - x).norm() < 0.2 * x.norm()
    for powers_of_two in (False, True):
        arithmetic = Arithmetic(
            quantizes=True, powers_of_two=powers_of_two, bfloat16_scales=False
        )
        padded = torch.nn.functional.pad(exact.float(), (lead, 256 - 200 - lead))
        assert torch.equal(arithmetic.activations(padded), padded)
