"""What parity reads from a config.json, and what it refuses."""

import json
from pathlib import Path

import pytest

from vllm_patch.cli import UsageError
from vllm_patch.cli.model_config import ModelConfig

MODELS = Path(__file__).parent.parent / "models"
QWEN3_MOE = MODELS / "qwen3_moe_1536.json"


@pytest.fixture
def fields():
    return json.loads(QWEN3_MOE.read_text())


def write(tmp_path, fields) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields))
    return file


def test_sizes():
    config = ModelConfig.read(QWEN3_MOE)
    assert (config.block, config.vocab_size) == (128, 4096)
    sizes = {"intermediate_size": 2048, "moe_intermediate_size": 1536}
    assert config.mlp_sizes == sizes


def test_widened():
    """To multiples of 8 x 128: experts, and the dense layer."""
    config = ModelConfig.read(MODELS / "glm4_moe_1408.json")
    sizes = {"moe_intermediate_size": 2048, "intermediate_size": 11264}
    assert config.widened(8).mlp_sizes == sizes
    assert config.widened(8).widened(8) == config.widened(8)


def test_a_nested_language_model(tmp_path, fields):
    quantization = fields.pop("quantization_config")
    nested = {"text_config": fields, "quantization_config": quantization}
    config = ModelConfig.read(write(tmp_path, nested))
    assert config.mlp_sizes["moe_intermediate_size"] == 1536
    assert config.with_layers(1).text["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # LongCat, Granite, Llama 4.
        ({"ffn_hidden_size": 12288}, "has ffn_hidden_size = 12288: parity does not"),
        # Of the dense layers of MiniMax-M3.
        ({"dense_intermediate_size": 12288}, "has dense_intermediate_size = 12288"),
        ({"expert_ffn_hidden_size": 2048}, "has expert_ffn_hidden_size = 2048: "),
        ({"shared_intermediate_size": 1024}, "has shared_intermediate_size = 1024: "),
        ({"intermediate_size_mlp": 16384}, "has intermediate_size_mlp = 16384: "),
        ({"moe_intermediate_size": [1536, 512]}, r"= \[1536, 512\]; give a number"),
        ({"num_hidden_layers": None}, "has num_hidden_layers = None; give a number"),
        ({"vocab_size": "many"}, "has vocab_size = 'many'; give a number"),
        (
            {"num_experts": 0, "moe_intermediate_size": 0, "intermediate_size": 0},
            "has no intermediate_size: parity does not",
        ),
    ],
)
def test_sizes_that_are_not_known_are_refused(tmp_path, fields, changes, message):
    with pytest.raises(UsageError, match=message):
        ModelConfig.read(write(tmp_path, {**fields, **changes}))


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size"])
def test_sizes_that_are_not_there_are_refused(tmp_path, fields, name):
    del fields[name]
    with pytest.raises(UsageError, match=f"has {name} = None; give a number"):
        ModelConfig.read(write(tmp_path, fields))


def test_layers_are_cut_with_their_types(tmp_path, fields):
    fields["layer_types"] = ["full_attention", "linear_attention"]
    config = ModelConfig.read(write(tmp_path, fields))
    assert config.with_layers(1).text["layer_types"] == ["full_attention"]
    with pytest.raises(UsageError, match="--layers 3: .* has 2 layers; give 1 to 2"):
        config.with_layers(3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file .*config.json'. Give the config"),
        ("{", "config.json: Expecting property name"),
        ("[]", "config.json holds no JSON object"),
    ],
)
def test_what_is_no_config(tmp_path, content, message):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        ModelConfig.read(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (None, "has quant_method = None and no FP8 blocks"),
        ({"quant_method": "awq"}, "has quant_method = 'awq'"),
        ({"quant_method": "fp8"}, "has quant_method = 'fp8' and no FP8 blocks"),
        ({"quant_method": "quark"}, "has quant_method = 'quark' and no FP8 blocks"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 64]},
            r"has quant blocks of \[128, 64\]; blocks must be square",
        ),
    ],
)
def test_other_quantization_is_refused(tmp_path, fields, quantization, message):
    fields["quantization_config"] = quantization
    with pytest.raises(UsageError, match=message):
        ModelConfig.read(write(tmp_path, fields))
