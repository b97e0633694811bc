"""The synthetic checkpoint looks like a published one, and shows a wrong scale."""

import json
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.cli.test_model_config import MODELS, QWEN3_MOE
from vllm_patch.cli import UsageError
from vllm_patch.cli.cpu_fp8.plain_torch import dequantize
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import _widen, _widen_scale, write_checkpoint

FILE = "model.safetensors"


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
    scale = tensors[f"{name}.weight_scale_inv"]
    weight = dequantize(tensors[f"{name}.weight"], scale, [128, 128])
    assert weight.square().sum(1).mean().sqrt().item() == pytest.approx(1, rel=0.05)


def test_what_is_not_quantized_is_listed(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    skipped = config["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.mlp.gate" in skipped
    assert not [name for name in skipped if "experts" in name or "proj" in name]
    assert config["num_hidden_layers"] == 1


def read(directory) -> dict[str, torch.Tensor]:
    with safe_open(directory / FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("model", "layers", "widened"),
    [
        ("qwen3_moe_1536", 1, ["experts.3.gate_proj", "experts.3.down_proj"]),
        (
            "glm4_moe_1408",
            2,
            [
                "experts.3.up_proj",
                "shared_experts.gate_proj",
                "shared_experts.down_proj",
                "layers.0.mlp.up_proj",
            ],
        ),
        ("qwen3_2432", 1, ["layers.0.mlp.gate_proj", "layers.0.mlp.down_proj"]),
    ],
)
def test_a_widened_model_holds_the_same_numbers_and_zeros(
    tmp_path, model, layers, widened
):
    config = ModelConfig.read(MODELS / f"{model}.json").with_layers(layers)
    if config.text.get("n_routed_experts"):
        config = config._with_text(n_routed_experts=4, intermediate_size=1088)
    wide = config.widened(8)
    for each in ("plain", "wide"):
        (tmp_path / each).mkdir()
    write_checkpoint(config, tmp_path / "plain")
    write_checkpoint(config, tmp_path / "wide", wide)
    assert ModelConfig.read(tmp_path / "wide" / "config.json").mlp_sizes == (
        wide.mlp_sizes
    )
    tensors, grown = read(tmp_path / "plain"), set()
    for name, larger in read(tmp_path / "wide").items():
        tensor = tensors.pop(name)
        if larger.shape != tensor.shape:
            grown.add(name)
        rows, columns = (*tensor.shape, 1)[:2]
        larger = larger.float().reshape(larger.shape[0], -1)
        tensor = tensor.float().reshape(tensor.shape[0], -1)
        assert torch.equal(larger[:rows, :columns], tensor), name
        # Not 1: see _widen_scale about the CPU kernel.
        value = tensor.min() if name.endswith("_scale_inv") else 0.0
        assert (larger[rows:] == value).all() and (larger[:, columns:] == value).all()
    assert not tensors
    for module in widened:
        assert [name for name in grown if name.endswith(f"{module}.weight")], module


# Dense, with gate and up in one tensor.
PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "pad_token_id": 0,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
# One dense layer and one of four routed experts and a shared one.
AIR = {"n_routed_experts": 4, "intermediate_size": 1088, "num_experts_per_tok": 2}


def logits(directory) -> torch.Tensor:
    """Return what Transformers computes in float32 with dequantized weights."""
    from transformers import AutoModelForCausalLM

    tensors = read(directory)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale, weight = tensors.pop(name), name.removesuffix("_scale_inv")
        tensors[weight] = dequantize(tensors[weight], scale, [128, 128])
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: t.float() for name, t in tensors.items()}, directory / FILE)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.arange(64).reshape(2, 32) * 7
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    ("fields", "grown"),
    [
        ({**json.loads((MODELS / "glm4_moe_1408.json").read_text()), **AIR}, 2048),
        (PHI3, 1024),
    ],
    ids=["shared expert", "gate and up in one"],
)
def test_a_widened_model_computes_the_same(tmp_path, fields, grown):
    """But for float32's rounding: zeros regroup what is summed, 2**-24 each time."""
    config = ModelConfig(tmp_path, fields)
    wide = config.widened(8)
    assert grown in wide.mlp_sizes.values()
    for name, model in ("plain", config), ("wide", wide):
        (tmp_path / name).mkdir()
        write_checkpoint(config, tmp_path / name, model)
    plain, wide = logits(tmp_path / "plain"), logits(tmp_path / "wide")
    assert plain.std() > 0.1
    torch.testing.assert_close(wide, plain, rtol=0, atol=64 * 2**-24)


def test_gate_and_up_in_one_tensor_are_widened_each():
    weight = torch.arange(1, 513).float()[:, None].expand(512, 128)
    scale = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    name, shape = "mlp.gate_up_proj.weight", (768, 128)
    wide = _widen(name, weight, shape)
    wide_scale = _widen_scale(name, weight, scale, shape, 128)
    assert wide[[0, 255, 256, 384, 639, 640]][:, 0].tolist() == [1, 256, 0, 257, 512, 0]
    assert wide_scale.flatten().tolist() == [1, 2, 1, 3, 4, 1]


def test_gate_and_up_in_one_quant_block_cannot_be_widened():
    weight, scale = torch.zeros(64, 128), torch.zeros(1, 1)
    with pytest.raises(UsageError, match="64 / 2 rows each, and cannot be widened"):
        _widen_scale("mlp.gate_up_proj.weight", weight, scale, (512, 128), 128)


def test_fused_experts_are_widened_each():
    weight = torch.arange(1, 5).float()[:, None].expand(2, 4, 1)
    wide = _widen("experts.gate_up_proj", weight, (2, 6, 1))
    assert wide[..., 0].tolist() == [[1, 2, 0, 3, 4, 0]] * 2


def test_what_stays_in_bfloat16_is_widened_too(tmp_path):
    config = ModelConfig.read(MODELS / "qwen3_2432.json").with_layers(1)
    quantization = config.fields["quantization_config"]
    quantization["modules_to_not_convert"] = ["model.layers.0.mlp"]
    write_checkpoint(config, tmp_path, config.widened(8))
    tensors = read(tmp_path)
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    assert up.dtype == torch.bfloat16 and up.shape[0] == 3072
    assert up[:2432].any() and not up[2432:].any()
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape[1] == 3072
    assert "model.layers.0.mlp.up_proj.weight_scale_inv" not in tensors


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_what_there_is_no_room_for_is_refused(tmp_path, monkeypatch, what):
    if what == "memory":
        free = SimpleNamespace(available=10**7)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    else:
        free = SimpleNamespace(free=10**7)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    config = ModelConfig.read(QWEN3_MOE).with_layers(1)
    with pytest.raises(UsageError, match=f"GB of {what}, and 0.0 GB are free; give"):
        write_checkpoint(config, tmp_path)
    assert not [*tmp_path.glob("*.safetensors")]
