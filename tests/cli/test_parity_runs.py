"""Which engines parity compares: a baseline and a control always exist."""

import argparse
import json
from pathlib import Path

import pytest

from tests.cli.test_model_config import MODELS, QWEN3_MOE
from vllm_patch.cli import UsageError
from vllm_patch.cli.check import command as check
from vllm_patch.cli.check.checkpoint import Checkpoint
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.parity_runs import Runs, batches

AIR = MODELS / "glm4_moe_1408.json"
DENSE = MODELS / "qwen3_2432.json"
FIVE_BLOCKS = {"moe_intermediate_size": 640, "num_attention_heads": 40}


@pytest.fixture
def labels(tmp_path, monkeypatch):
    """Return the labels of the runs for a config, and the configs that are written."""
    from vllm_patch.cli import synthetic

    written = {}

    def note(config, directory, wide):
        written[str(directory)] = wide

    monkeypatch.setattr(synthetic, "write_checkpoint", note)

    def choose(
        file,
        tp=8,
        model=None,
        is_on_cpu=True,
        baseline=1,
        control=None,
        engine_args=None,
        **changes,
    ):
        work = tmp_path / f"cpu-{is_on_cpu}"
        work.mkdir()
        path = work / "config.json"
        path.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        config = ModelConfig.read(path)
        args = argparse.Namespace(
            tp=tp,
            baseline_tp=baseline,
            control_tp=control,
            model=model,
            engine_args=engine_args or {"max_model_len": 512},
        )
        processes = Runs(args, config, is_on_cpu).processes(work)
        sizes = {
            role: (process.engine, written.get(process.engine["model"], config))
            for role, process in processes.items()
        }
        return {role: process.label for role, process in processes.items()}, sizes

    return choose


@pytest.mark.parametrize(
    ("file", "changes", "baseline", "control"),
    [
        (QWEN3_MOE, {}, "stock TP 1", "stock TP 4 (control)"),
        # 1280 / 8 = 160: ten blocks, which TP 2 keeps whole.
        (MODELS / "qwen3_moe_1280.json", {}, "stock TP 1", "stock TP 2 (control)"),
        # Five blocks: TP 5 keeps them whole where it divides the heads.
        (QWEN3_MOE, FIVE_BLOCKS, "stock TP 1", "stock TP 8, widened (control)"),
        (
            QWEN3_MOE,
            {**FIVE_BLOCKS, "num_key_value_heads": 40},
            "stock TP 1",
            "stock TP 8, widened (control)",
        ),
        # And the rows of the vocabulary, in whole 64s: 4160 of 4100, not 4096.
        (
            QWEN3_MOE,
            {**FIVE_BLOCKS, "num_key_value_heads": 40, "vocab_size": 4100},
            "stock TP 1",
            "stock TP 5 (control)",
        ),
        # Routed and shared experts of 11 blocks, dense layers of 85.5.
        (AIR, {}, "stock TP 1, widened", "stock TP 8, widened (control)"),
        # 19 blocks; eight heads of 64 stay whole up to TP 4.
        (DENSE, {}, "stock TP 1", "stock TP 4, widened (control)"),
        # Two KV heads of 64 are one block: only TP 1 keeps it.
        (
            DENSE,
            {"num_key_value_heads": 2},
            "stock TP 1",
            "stock TP 1, prompt by prompt (control)",
        ),
        # No field for the experts alone: shared experts are widened with them.
        (
            QWEN3_MOE,
            {"moe_intermediate_size": 640, "n_shared_experts": 1},
            "stock TP 1",
            "stock TP 8, widened (control)",
        ),
    ],
)
def test_a_synthetic_model_has_a_control(labels, file, changes, baseline, control):
    for is_on_cpu in (True, False):
        found, runs = labels(file, is_on_cpu=is_on_cpu, **changes)
        assert found == {
            "baseline": baseline,
            "control": control,
            "stock": "stock TP 8",
            "patched": "patched TP 8",
        }
        for role in ("baseline", "control"):
            engine, config = runs[role]
            found = Checkpoint("", config.fields, None)
            verdict = check.verdict(found, engine["tensor_parallel_size"])
            assert not verdict.is_cut and not verdict.undivided
        assert runs["stock"] == runs["patched"]
        assert runs["patched"][1].mlp_sizes == runs["stock"][1].mlp_sizes
        assert {engine["max_model_len"] for engine, _ in runs.values()} == {512}


@pytest.mark.parametrize(
    ("changes", "is_on_cpu", "control"),
    [
        ({"moe_intermediate_size": 640}, False, "stock TP 8 + expert parallel"),
        # vLLM has no expert parallelism on a CPU.
        ({"moe_intermediate_size": 640}, True, "stock TP 1, prompt by prompt"),
        # Expert parallelism does not rescue shared experts.
        (
            {"moe_intermediate_size": 640, "n_shared_experts": 1},
            False,
            "stock TP 1, prompt by prompt",
        ),
    ],
)
def test_a_given_checkpoint_has_a_control(
    labels, tmp_path, changes, is_on_cpu, control
):
    found, runs = labels(QWEN3_MOE, model=tmp_path, is_on_cpu=is_on_cpu, **changes)
    assert found["control"] == f"{control} (control)"
    engine, _ = runs["control"]
    assert engine["model"] == str(tmp_path)
    assert ("enable_expert_parallel" in engine) == ("expert" in control)
    assert ("max_num_seqs" in engine) == ("prompt" in control)


def test_the_baselines_size_as_control_batches_otherwise(labels):
    found, _ = labels(QWEN3_MOE, baseline=2, control=2)
    assert found["control"] == "stock TP 2, prompt by prompt (control)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # One KV head of 64: no stock run has whole blocks, at TP 1 neither.
        (
            {"num_key_value_heads": 1},
            "--baseline-tp 1 cuts quant .* nor at any up to 8: there is nothing",
        ),
        ({"control": 8}, "--control-tp 8 cuts quant blocks of .* it is at 1, 2, 4."),
        # 2440 columns end inside a block at any size.
        (
            {"intermediate_size": 2440, "model": Path("here")},
            "--baseline-tp 1 cuts quant .* up to 8: .* with --config, which",
        ),
        ({"control": 3}, "--control-tp 3 does not divide num_attention_heads 8"),
        ({"tp": 1}, "--tp 1 keeps the quant blocks of"),
        (
            {"model_type": "deepseek_v4"},
            "not known: .*deepseek_v4 pads its own layers, so not what --tp 8 cuts",
        ),
    ],
)
def test_where_there_is_nothing_to_judge_by(labels, arguments, message):
    with pytest.raises(UsageError, match=message):
        labels(DENSE, **arguments)


@pytest.mark.parametrize("control", [None, 1])
def test_a_control_that_is_the_baseline_again_is_refused(labels, control):
    """Of whole blocks at TP 1 only, one prompt at a time in both."""
    changes = {"num_key_value_heads": 2, "engine_args": {"max_num_seqs": 1}}
    with pytest.raises(UsageError, match="control would be the baseline again: both"):
        labels(DENSE, control=control, **changes)


def test_what_is_scored_is_fixed():
    together, *alone = batches(4096)
    assert [together, *alone] == batches(4096)
    assert [len(prompt) for prompt in together] == [96] * 8
    assert [[len(prompt) for prompt in batch] for batch in alone] == (
        [[4]] * 16 + [[16]] * 8
    )
