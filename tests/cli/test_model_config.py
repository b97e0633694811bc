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
    assert config.mlp_sizes == {"moe_intermediate_size": 1536}
    assert [tp for tp in (1, 2, 4, 8, 16) if config.cuts(tp)] == [8, 16]


MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
MLA |= {"v_head_dim": 128, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("model", "changes", "cut", "cut_attention"),
    [
        ("qwen3_moe_1536", {}, [8, 16], [16]),  # 8 heads of 128
        ("qwen3_moe_1536", {"head_dim": 64}, [4, 8, 16], [4, 8, 16]),
        ("qwen3_moe_1536", {"head_dim": None}, [8, 16], [16]),
        ("qwen3_moe_1536", MLA, [8, 16], [8, 16]),  # 192 per head
        (
            "qwen3_moe_1536",
            {"shared_expert_intermediate_size": 256},
            [4, 8, 16],
            [16],
        ),
        # Not used by a layer, and then by one.
        ("qwen3_moe_1536", {"intermediate_size": 128}, [8, 16], [16]),
        (
            "qwen3_moe_1536",
            {"intermediate_size": 128, "mlp_only_layers": [0]},
            [2, 4, 8, 16],
            [16],
        ),
        ("qwen3_9728", {}, [8, 16], [16]),  # 76 blocks
        ("qwen3_2432", {}, [2, 4, 8, 16], [8, 16]),  # 19 blocks, 8 heads of 64
        # Dense layers of 85 blocks and a half, which stock cannot fuse at TP 1.
        ("glm4_moe_1408", {}, [1, 2, 4, 8, 16], [16]),
    ],
)
def test_what_is_cut(tmp_path, model, changes, cut, cut_attention):
    fields = json.loads((MODELS / f"{model}.json").read_text())
    config = ModelConfig.read(write(tmp_path, {**fields, **changes}))
    sizes = (1, 2, 4, 8, 16)
    assert [tp for tp in sizes if config.cuts(tp)] == cut
    assert [tp for tp in sizes if config.cuts_attention(tp)] == cut_attention


def test_a_widened_model_is_cut_in_its_attention_only():
    config = ModelConfig.read(MODELS / "glm4_moe_1408.json")
    assert not config.widened(8).cuts(8)
    assert config.widened(8).mlp_sizes == {
        "moe_intermediate_size": 2048,
        "intermediate_size": 11264,
    }
    dense = ModelConfig.read(MODELS / "qwen3_2432.json").widened(8)
    assert dense.cuts(8) and dense.mlp_sizes == {"intermediate_size": 3072}


@pytest.mark.parametrize(
    ("changes", "tp", "undivided"),
    [
        ({}, 8, None),
        ({}, 16, "num_attention_heads = 8"),
        ({"num_key_value_heads": 6, "num_attention_heads": 24}, 4, "num_key_value_hea"),
        ({"num_key_value_heads": 2}, 8, None),  # KV heads on four ranks each
        ({"moe_intermediate_size": 1532}, 8, "moe_intermediate_size = 1532"),
        ({"vocab_size": 4097}, 8, None),  # Rounded up to 65 times 64.
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, 3, "vocab_size = 4096"),
    ],
)
def test_what_cannot_be_shared_out(tmp_path, fields, changes, tp, undivided):
    found = ModelConfig.read(write(tmp_path, {**fields, **changes})).undivided(tp)
    assert (found or "").startswith(undivided or "") and bool(found) == bool(undivided)


def test_a_nested_language_model(tmp_path, fields):
    quantization = fields.pop("quantization_config")
    nested = {"text_config": fields, "quantization_config": quantization}
    config = ModelConfig.read(write(tmp_path, nested))
    assert config.mlp_sizes == {"moe_intermediate_size": 1536}
    assert config.with_layers(1).text["num_hidden_layers"] == 1


def test_experts_under_the_dense_name(tmp_path, fields):
    del fields["moe_intermediate_size"]
    for count, only in ({"num_experts": 0}, False), ({"num_local_experts": 8}, True):
        config = ModelConfig.read(write(tmp_path, {**fields, **count}))
        assert config.mlp_sizes == {"intermediate_size": 2048}
        assert config.cuts_experts_only(32) is False  # The attention, too.
        config = config._with_text(intermediate_size=1536)
        assert config.cuts(8) and config.cuts_experts_only(8) is only


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        # ERNIE 4.5, whose first layer is dense.
        (
            {"moe_layer_start_index": 1, "moe_num_shared_experts": 2},
            {"intermediate_size"},
        ),
        ({"moe_layer_interval": 2}, {"intermediate_size"}),
        ({"moe_layer_end_index": 0}, {"intermediate_size"}),
        ({"moe_layer_end_index": 1}, set()),
        ({"mlp_layer_types": ["dense", "sparse"]}, {"intermediate_size"}),
        # Bailing.
        (
            {"num_shared_experts": 1, "moe_shared_expert_intermediate_size": 512},
            {"moe_shared_expert_intermediate_size"},
        ),
        ({"shared_expert_intermediate_size": 0}, set()),
    ],
)
def test_other_spellings(tmp_path, fields, changes, others):
    config = ModelConfig.read(write(tmp_path, {**fields, **changes}))
    assert set(config.mlp_sizes) == {"moe_intermediate_size"} | others


@pytest.mark.parametrize(
    "name", ["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"]
)
def test_shared_experts_are_cut_with_routed_ones(tmp_path, fields, name):
    for shared in 0, 1:
        config = ModelConfig.read(write(tmp_path, {**fields, name: shared}))
        assert config.cuts_experts_only(8) is not bool(shared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # LongCat, Bailing with two in one, Granite, Step, Llama 4.
        ({"ffn_hidden_size": 12288}, "has ffn_hidden_size = 12288: parity does not"),
        ({"expert_ffn_hidden_size": 2048}, "has expert_ffn_hidden_size = 2048: "),
        (
            {"num_shared_experts": 2, "moe_shared_expert_intermediate_size": 576},
            "has moe_shared_expert_intermediate_size = 576: ",
        ),
        ({"shared_intermediate_size": 1024}, "has shared_intermediate_size = 1024: "),
        ({"share_expert_dim": 2048}, "has share_expert_dim = 2048: parity does not"),
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
