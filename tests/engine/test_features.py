"""Engine features at a cut size that only the real engine brings together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_patch.cli import comparison, engine_process
from vllm_patch.cli.cpu_fp8 import operators
from vllm_patch.cli.engine_process import EngineProcess
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint

from .test_serve import CONTROL, QWEN3_MOE, START_SECONDS

QWEN3 = QWEN3_MOE.parent / "qwen3_2432.json"
GLM4_MOE = QWEN3_MOE.parent / "glm4_moe_1408.json"
IS_PLAIN_TORCH = operators.choose() == operators.PLAIN_TORCH


def written(source: Path, directory: Path, **sizes: int) -> Path:
    """Write a random checkpoint of a model of two layers."""
    write_checkpoint(ModelConfig.read(source)._with_text(**sizes), directory)
    return directory


def engine(checkpoint: Path, **arguments) -> dict:
    return {"model": str(checkpoint), "max_model_len": 128, **arguments}


# vLLM 0.32's runner for CPUs has no pipelines where it does not compile.
@pytest.mark.skipif(IS_PLAIN_TORCH, reason="plain torch is not for torch.compile")
def test_pipeline_parallel(checkpoint, prompts, expected, tmp_path):
    """A layer and two ranks a stage, each of which says what it holds."""
    stages = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}
    stages = engine(checkpoint, enforce_eager=False, **stages)
    patched = engine_process.run(
        EngineProcess("two stages", stages, patched=True),
        [[prompt] for prompt in prompts],
        tmp_path,
        START_SECONDS,
    )
    assert patched.scores, patched.error
    assert "1 MoE layers, 384 / TP 2 = 192 padded to 256" in patched.padding
    gap = comparison.difference(expected, patched.scores)
    assert gap.within(comparison.limits(CONTROL)), gap


def drafted(checkpoint: Path, tmp_path: Path, prompts, **speculative) -> tuple:
    """Generate at TP 2; return the log, and how many tokens were drafted and right."""
    spec, out = tmp_path / "spec", tmp_path / "out"
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
    return log, json.loads(out.read_text())


def test_a_draft_model_in_blocks(prompts, tmp_path, tmp_path_factory):
    """It drafts what the model would say, being the same: all but ties is right.

    A dense one: vLLM 0.32 quantizes the gates of a draft model's experts.
    """
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    written(QWEN3, checkpoint, intermediate_size=384)
    log, tokens = drafted(
        *(checkpoint, tmp_path, prompts),
        method="draft_model",
        model=str(checkpoint),
        num_speculative_tokens=2,
    )
    assert log.count("2 gate_up_proj layers, 384 / TP 2 = 192 padded to 256") == 2
    assert tokens["draft"] >= 2 * len(prompts)
    assert tokens["accepted"] >= 0.8 * tokens["draft"]


def test_multi_token_prediction_in_blocks(prompts, tmp_path, tmp_path_factory):
    """Its layer is the model's own again, and it is told the token, so it is right.

    But for attention, which lacks the first tokens: prompts of some length.
    """
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    sizes = {"first_k_dense_replace": 0, "moe_intermediate_size": 384}
    written(GLM4_MOE, checkpoint, **sizes)
    predict_by_the_last_layer(checkpoint)
    log, tokens = drafted(
        *(checkpoint, tmp_path, prompts[1:]), method="mtp", num_speculative_tokens=1
    )
    assert log.count("1 MoE layers, 384 / TP 2 = 192 padded to 256") == 2
    assert log.count("1 gate_up_proj layers, 384 / TP 2 = 192 padded to 256") == 2
    assert tokens["draft"] >= 8 * len(prompts[1:])
    assert tokens["accepted"] >= 0.8 * tokens["draft"]


def predict_by_the_last_layer(checkpoint: Path) -> None:
    """Make the second of two layers a prediction module, with the first's weights."""
    file, path = checkpoint / "model.safetensors", checkpoint / "config.json"
    first, module = "model.layers.0.", "model.layers.1."
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith(module)}
    tensors |= {
        name.replace(first, module): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(first)
    }
    norm = tensors["model.norm.weight"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{module}{name}.weight"] = norm.clone()
    token = torch.eye(len(norm), dtype=norm.dtype)
    projection = torch.cat([token, torch.zeros_like(token)], 1)
    tensors[f"{module}eh_proj.weight"] = projection
    save_file(tensors, file)
    fields = json.loads(path.read_text())
    fields |= {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    path.write_text(json.dumps(fields))
