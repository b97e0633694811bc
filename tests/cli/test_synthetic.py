"""The synthetic checkpoint looks like a published one, and shows a wrong scale."""

import json

import pytest
import torch
from safetensors import safe_open

from tests.cli.test_model_config import QWEN3_MOE
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(ModelConfig.read(QWEN3_MOE).with_layers(1), directory)
    return directory


@pytest.fixture(scope="module")
def tensors(checkpoint):
    return read(checkpoint)


def test_tensors_are_those_of_a_published_checkpoint(tensors):
    down = "model.layers.0.mlp.experts.15.down_proj"
    assert tensors[f"{down}.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{down}.weight"].shape == (1024, 1536)
    assert tensors[f"{down}.weight_scale_inv"].shape == (8, 12)
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert not [name for name in tensors if name.startswith("model.layers.1.")]


def test_neighbouring_blocks_differ_ten_times_in_scale(tensors):
    for name, scale in tensors.items():
        if name.endswith("_scale_inv"):
            ratios = [scale[1:] / scale[:-1], scale[:, 1:] / scale[:, :-1]]
            steps = torch.cat([ratio.log10().abs().flatten() for ratio in ratios])
            assert torch.allclose(steps, torch.ones(len(steps))), name


def test_layers_keep_the_size_of_their_input(tensors):
    name = "model.layers.0.self_attn.q_proj"
    scale = tensors[f"{name}.weight_scale_inv"].repeat_interleave(128, 0)
    weight = tensors[f"{name}.weight"].float() * scale.repeat_interleave(128, 1)
    assert weight.square().sum(1).mean().sqrt().item() == pytest.approx(1, rel=0.05)


def test_what_is_not_quantized_is_listed(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    skipped = config["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.mlp.gate" in skipped
    assert not [name for name in skipped if "experts" in name or "proj" in name]
    assert config["num_hidden_layers"] == 1


def read(directory) -> dict[str, torch.Tensor]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_widened_experts_hold_the_same_numbers_and_zeros(tensors, tmp_path):
    config = ModelConfig.read(QWEN3_MOE).with_layers(1)
    write_checkpoint(config, tmp_path, expert_size=2048)
    assert ModelConfig.read(tmp_path / "config.json").expert_size == 2048
    widened = read(tmp_path)
    assert widened.keys() == tensors.keys()
    for name, wide in widened.items():
        tensor = tensors[name]
        rows, columns = (*tensor.shape, 1)[:2]
        wide = wide.float().reshape(wide.shape[0], -1)
        tensor = tensor.float().reshape(tensor.shape[0], -1)
        assert torch.equal(wide[:rows, :columns], tensor), name
        # Not 1: see _widen about the CPU kernel.
        value = tensor.min() if name.endswith("_scale_inv") else 0.0
        assert (wide[rows:] == value).all() and (wide[:, columns:] == value).all()
    down = "model.layers.0.mlp.experts.0.down_proj"
    assert widened[f"{down}.weight"].shape == (1024, 2048)
    assert widened[f"{down}.weight_scale_inv"].shape == (8, 16)
