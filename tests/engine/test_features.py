"""Engine features at a cut size that only the real engine brings together."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_patch.cli import comparison, engine_process
from vllm_patch.cli.cpu_fp8 import operators
from vllm_patch.cli.engine_process import EngineProcess
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint

from .test_serve import CONTROL, QWEN3_MOE, START_SECONDS

QWEN3 = QWEN3_MOE.parent / "qwen3_2432.json"
IS_PLAIN_TORCH = operators.choose() == operators.PLAIN_TORCH


def written(source: Path, directory: Path, **sizes: int) -> Path:
    """Write a random checkpoint of a model of two layers."""
    write_checkpoint(ModelConfig.read(source)._with_text(**sizes), directory)
    return directory


@pytest.fixture
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, 4096) for _ in range(n)] for n in (4, 64, 64)]


def engine(checkpoint: Path, **arguments) -> dict:
    return {"model": str(checkpoint), "max_model_len": 128, **arguments}


# vLLM 0.32's runner for CPUs has no pipelines where it does not compile.
@pytest.mark.skipif(IS_PLAIN_TORCH, reason="plain torch is not for torch.compile")
def test_pipeline_parallel(prompts, tmp_path, tmp_path_factory):
    """A layer and two ranks a stage, each of which says what it holds."""
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    written(QWEN3_MOE, checkpoint, moe_intermediate_size=384)
    batches = [[prompt] for prompt in prompts]
    stages = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}
    stages = engine(checkpoint, enforce_eager=False, **stages)
    stock, patched = (
        engine_process.run(process, batches, tmp_path, START_SECONDS)
        for process in (
            EngineProcess("stock TP 1", engine(checkpoint)),
            EngineProcess("two stages", stages, patched=True),
        )
    )
    assert patched.scores, patched.error
    assert "1 MoE layers, 384 / TP 2 = 192 padded to 256" in patched.padding
    gap = comparison.difference(stock.scores, patched.scores)
    assert gap.within(comparison.limits(CONTROL)), gap


def test_a_draft_model_in_blocks(prompts, tmp_path, tmp_path_factory):
    """It drafts what the model would say, being the same: all but ties is right.

    A dense one: vLLM 0.32 quantizes the gates of a draft model's experts.
    """
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    written(QWEN3, checkpoint, intermediate_size=384)
    spec, out = tmp_path / "spec", tmp_path / "out"
    speculative = {
        "method": "draft_model",
        "model": str(checkpoint),
        "num_speculative_tokens": 2,
    }
    arguments = {"tensor_parallel_size": 2, "speculative_config": speculative}
    arguments = engine(checkpoint, **arguments)
    spec.write_text(json.dumps({"engine": arguments, "prompts": prompts}))
    command = [sys.executable, "-m", "tests.engine.speculate", str(spec), str(out)]
    done = subprocess.run(
        command,
        env={**engine_process.environment(patched=True), **os.environ},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    assert log.count("2 gate_up_proj layers, 384 / TP 2 = 192 padded to 256") == 2
    tokens = json.loads(out.read_text())
    assert tokens["draft"] >= 2 * len(prompts)
    assert tokens["accepted"] >= 0.8 * tokens["draft"]
