"""The check that stands before the timings of linear layers."""

import pytest

from benchmarks import linear
from benchmarks.linear_cases import MERGED, QKV, ROW, Case

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
    return lambda: linear.main(["--check-only", "--tokens", "1", "--backends", backend])


def test_padded_layers_pass(check):
    assert check() == 0


def test_a_lead_of_zero_does_not_pass(check, monkeypatch, capsys):
    from vllm_patch.fp8_tp_padding import linear_layout, shard

    def at_the_start(*args):
        right = shard.block_shard(*args)
        fields = {**vars(right), "lead": 0}
        return shard.BlockShard(**fields)

    monkeypatch.setattr(linear_layout, "block_shard", at_the_start)
    assert check() == 1
    assert "PROBLEM" in capsys.readouterr().out


def test_nothing_checked_does_not_pass(plugin):
    assert (
        linear.main(["--check-only", "--backends", "B12xFp8BlockScaledMMKernel"]) == 1
    )
