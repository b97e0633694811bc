"""That a config.json alone implies the layers of the model that Transformers makes."""

import json
from pathlib import Path

import pytest

from vllm_patch.cli.check import derived, layers, quantization
from vllm_patch.cli.check.checkpoint import Tensor
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import _tensor_shapes

from . import known_models

FILES = sorted((Path(__file__).parents[2] / "models").glob("*.json"))
# Transformers does not have the other.
KNOWN = [name for name in known_models.MODELS if name != "Step-3.5-Flash"]


def small(name: str) -> dict:
    """Return a known model's config with what Transformers needs, and four layers."""
    fields = known_models.config(name)
    fields |= {"num_hidden_layers": 4, "vocab_size": 512, "tie_word_embeddings": True}
    if "moe_layer_end_index" in fields:
        fields["moe_layer_end_index"] = 3
    return fields


def both(fields: dict, tmp_path):
    """Return layers by the config, and by Transformers' tensors of it."""
    how = quantization.read(fields, "")
    shapes, linear = _tensor_shapes(ModelConfig(tmp_path, fields), tmp_path)
    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        # Too small for blocks, so in 16 bits in all checkpoints.
        is_small = module.endswith(("in_proj_ba", "shared_expert_gate", "gate.wg"))
        if module not in linear or not how.takes(module) or is_small:
            continue
        scale = (
            *shape[:-2],
            *(-(-n // b) for n, b in zip(shape[-2:], how.block, strict=True)),
        )
        tensors[name] = Tensor("F8_E4M3", shape, "")
        tensors[f"{module}.weight_scale_inv"] = Tensor("F32", scale, "")
    real = layers.layers(tensors, how, fields)
    implied = derived.tensors(fields, how)
    assert not implied.unknown
    return layers.layers(implied.tensors, how, fields), real


@pytest.mark.parametrize(
    "fields",
    [json.loads(file.read_text()) for file in FILES] + [small(name) for name in KNOWN],
    ids=[file.stem for file in FILES] + KNOWN,
)
def test_the_same_layers(fields, tmp_path):
    implied, real = both(fields, tmp_path)
    leaves = [
        sorted(
            (each.name.rpartition(".")[2], each.outputs, each.inputs, each.experts, n)
            for each, n in model.found.items()
        )
        for model in (implied, real)
    ]
    assert leaves[0] == leaves[1]
    assert not real.unknown and real.found


def test_dense_layers_with_a_size_of_their_own():
    fields = small("MiniMax-M2") | {"dense_intermediate_size": 12288}
    fields["mlp_layer_types"] = ["dense", "sparse", "sparse", "sparse"]
    found = derived.tensors(fields, quantization.read(fields, "")).tensors
    assert found["model.layers.0.mlp.up_proj.weight"].shape[0] == 12288
