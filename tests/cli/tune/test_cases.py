"""Which experts of a model are tuned, and for which rank."""

import json
from pathlib import Path

import pytest

from tests.cli.check.known_models import config
from vllm_patch.cli import UsageError
from vllm_patch.cli.check import checkpoint
from vllm_patch.cli.check import command as check
from vllm_patch.cli.tune.cases import TOP_K, Case, cases

MODELS = Path(__file__).parents[2] / "models"
QWEN = MODELS / "qwen3_moe_1536.json"


def test_the_sizes_are_those_of_the_model():
    fields = json.loads(QWEN.read_text())
    sizes = fields["num_experts"], fields["num_experts_per_tok"], fields["hidden_size"]
    assert cases(str(QWEN), 8) == [Case(*sizes, 1536, 8)]


@pytest.mark.parametrize(
    ("total", "tp", "start"),
    [
        # 176 columns from 96 on touch three blocks, 48 of all ranks.
        *((1408, 8, 48 + 48), (768, 4, 0)),
        # From 96 on they lie in two blocks.
        (768, 8, 96),
    ],
)
def test_the_rank_that_has_most_to_do(total, tp, start):
    assert Case(128, 8, 4096, total, tp).shard.lead == start


@pytest.mark.parametrize("name", TOP_K)
def test_experts_of_a_token(tmp_path, name):
    fields = json.loads(QWEN.read_text())
    del fields["num_experts_per_tok"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**fields, name: 6}))
    assert cases(str(path), 8)[0].top_k == 6
    path.write_text(json.dumps(fields))
    with pytest.raises(
        UsageError, match="how many experts a token has.*num_experts_per"
    ):
        cases(str(path), 8)


def test_experts_without_a_gate(monkeypatch):
    """What is timed has one."""
    verdict = check.verdict(checkpoint.read(str(QWEN)), 8)
    for row in verdict.rows:
        if row.layer.kind == "experts":
            row.layer.__dict__["outputs"] = row.layer.outputs[:1]
            verdict.text["hidden_act"] = "relu2"
    monkeypatch.setattr(check, "verdict", lambda *_: verdict)
    with pytest.raises(UsageError, match=r"experts: it has no gate, and gate and up"):
        cases(str(QWEN), 8)


def test_padded_experts_are_vllms(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "padded")
    with pytest.raises(UsageError, match="VLLM_FP8_TP_PADDING=padded"):
        cases(str(QWEN), 8)


@pytest.mark.parametrize("name", ["Qwen3-235B-A22B"])
def test_known_models_without_blocks(tmp_path, name):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config(name), "quantization_config": None}))
    with pytest.raises(UsageError, match="has no FP8 blocks that could be cut"):
        cases(str(path), 8)
