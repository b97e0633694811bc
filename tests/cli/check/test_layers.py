"""Which layers vLLM builds of a checkpoint's tensors."""

from dataclasses import replace

import pytest

from vllm_patch.cli import UsageError
from vllm_patch.cli.check.checkpoint import Tensor
from vllm_patch.cli.check.layers import layers
from vllm_patch.cli.check.quantization import Quantization

BLOCKS = Quantization("fp8", (128, 128))


def tensors(**shapes) -> dict[str, Tensor]:
    """Return FP8 weights in blocks and their scales, below one parent."""
    found = {}
    for name, shape in shapes.items():
        module = f"model.layers.0.{name.replace('__', '.')}"
        scale = *shape[:-2], *(-(-n // 128) for n in shape[-2:])
        found[f"{module}.weight"] = Tensor("F8_E4M3", shape, "a")
        found[f"{module}.weight_scale_inv"] = Tensor("F32", scale, "a")
    return found


def built(found, **fields) -> list[tuple]:
    model = layers(found, BLOCKS, fields)
    assert not model.unknown
    return sorted(
        (each.name.rpartition("*.")[2], each.kind, each.outputs, each.inputs)
        for each in model.found
    )


GATE, DOWN = (1536, 256), (256, 1536)


@pytest.mark.parametrize(
    ("shapes", "fields", "expected"),
    [
        (
            {"mlp__gate_proj": GATE, "mlp__up_proj": GATE, "mlp__down_proj": DOWN},
            {},
            [
                ("mlp.down_proj", "row", (256,), 1536),
                ("mlp.gate_up_proj", "merged", (1536, 1536), 256),
            ],
        ),
        # Mixtral's names, and MiniMax's of experts.
        ({"w1": GATE, "w3": GATE}, {}, [("gate_up_proj", "merged", (1536,) * 2, 256)]),
        (
            {
                f"moe__experts__{e}__{w}": DOWN if w == "w2" else GATE
                for e in (0, 1)
                for w in ("w1", "w2", "w3")
            },
            {},
            [("moe.experts", "experts", (1536, 1536), 256)],
        ),
        # Without a gate: Nemotron's.
        (
            {"experts__0__up_proj": GATE, "experts__0__down_proj": DOWN},
            {},
            [("experts", "experts", (1536,), 256)],
        ),
        # Step's, one tensor for each role.
        (
            {
                "moe__gate_proj": (4, *GATE),
                "moe__up_proj": (4, *GATE),
                "moe__down_proj": (4, *DOWN),
            },
            {},
            [("moe", "experts", (1536, 1536), 256)],
        ),
        (
            {"q_proj": (1024, 256), "k_proj": (128, 256), "v_proj": (128, 256)},
            {"head_dim": 64},
            [("qkv_proj", "qkv", (1024, 128, 128), 256)],
        ),
        # MLA without and with a low rank of q.
        (
            {"q_proj": (3072, 256), "kv_a_proj_with_mqa": (576, 256)},
            {"kv_lora_rank": 512},
            [
                ("kv_a_proj_with_mqa", "replicated", (576,), 256),
                ("q_proj", "column", (3072,), 256),
            ],
        ),
        (
            {"q_a_proj": (1536, 256), "kv_a_proj_with_mqa": (576, 256)},
            {},
            [("fused_qkv_a_proj", "replicated", (1536, 576), 256)],
        ),
        # Qwen3-Next's is interleaved, so one; Qwen3.5's are two on disk and four then.
        (
            {"linear_attn__in_proj_qkvz": (12288, 256)},
            {},
            [("linear_attn.in_proj_qkvz", "column", (12288,), 256)],
        ),
        (
            {"in_proj_qkv": (8192, 256), "in_proj_z": (4096, 256)},
            {"linear_num_key_heads": 16, "linear_key_head_dim": 128},
            [("in_proj_qkvz", "merged", (2048, 2048, 4096, 4096), 256)],
        ),
        # Of these, each rank has all.
        (
            {"indexer__wq_b": (8192, 256), "indexer__wk": (128, 256)},
            {},
            [
                ("indexer.wk", "replicated", (128,), 256),
                ("indexer.wq_b", "replicated", (8192,), 256),
            ],
        ),
        ({"gate_up_proj": (256, 64)}, {}, [("gate_up_proj", "merged", (128,) * 2, 64)]),
    ],
)
def test_layers(shapes, fields, expected):
    assert built(tensors(**shapes), **fields) == expected


@pytest.mark.parametrize(
    ("shapes", "fields"),
    [
        ({"mlp__mystery": GATE}, {}),
        ({"mlp__gate_proj": GATE}, {}),  # Its sibling is in 16 bits, or is not there.
        ({"qkv_proj": (1280, 256)}, {"head_dim": 64}),
        ({"q_proj": (100, 256), "k_proj": (64, 256), "v_proj": (64, 256)}, {}),
        # Stored as [experts, columns, rows].
        (
            {"experts__gate_up_proj": (4, 256, 3072), "experts__down_proj": (4, *GATE)},
            {},
        ),
    ],
)
def test_shapes_that_nobody_knows(shapes, fields):
    model = layers(tensors(**shapes), BLOCKS, fields)
    assert model.unknown and not model.found


def test_other_towers():
    """A vision tower has layers and heads of its own; its q, k and v are not known."""
    found = tensors(o_proj=GATE, q_proj=DOWN, k_proj=DOWN, v_proj=DOWN)
    tower = "vision_tower.encoder.layers.30"
    found = {name.replace("model.layers.0", tower): t for name, t in found.items()}
    model = layers(found, BLOCKS, {"num_hidden_layers": 2, "head_dim": 128})
    assert not model.notes
    assert [layer.kind for layer in model.found] == ["row"]
    assert [*model.unknown] == [f"{tower.replace('30', '*')}.qkv_proj"]


def test_a_layer_at_the_top():
    found = {name[15:]: tensor for name, tensor in tensors(lm_head=GATE).items()}
    assert [*layers(found, BLOCKS, {}).unknown] == ["lm_head"]


@pytest.mark.parametrize("kind", ["deepseek_v4", "deepseek_v41_text", "dots3_note"])
def test_models_that_pad_their_own_layers(kind):
    """Their shared experts of 1536 columns are not cut, whatever the sizes say."""
    found = tensors(mlp__gate_proj=GATE, mlp__up_proj=GATE, mlp__down_proj=DOWN)
    model = layers(found, BLOCKS, {"model_type": kind})
    assert "pads its own layers" in str(model.unknown) and not model.found


def test_layers_for_prediction_are_left_out():
    found = tensors(o_proj=GATE)
    found |= {name.replace("s.0", "s.61"): each for name, each in found.items()}
    model = layers(found, BLOCKS, {"num_hidden_layers": 61})
    assert [*model.found.values()] == [1]
    assert model.notes == ["layers for multi-token prediction are left out"]


def test_other_scales_are_stock():
    """Per tensor, per channel; FP4, whose scales are FP8; and 16 bits."""
    found = {
        "a.o_proj.weight": Tensor("F8_E4M3", GATE, ""),
        "a.o_proj.weight_scale": Tensor("F32", (), ""),
        "b.o_proj.weight": Tensor("F8_E4M3", GATE, ""),
        "b.o_proj.weight_scale": Tensor("F32", (1536, 1), ""),
        "c.o_proj.weight": Tensor("U8", (1536, 128), ""),
        "c.o_proj.weight_scale": Tensor("F8_E4M3", (1536, 16), ""),
        "d.o_proj.weight": Tensor("BF16", GATE, ""),
    }
    model = layers(found, replace(BLOCKS, is_uniform=False), {})
    assert not model.found and not model.unknown
    assert model.other_bytes == sum(tensor.bytes for tensor in found.values())


def test_a_block_of_one_scale():
    """As small as one quant block, which is not per tensor."""
    assert built(tensors(o_proj=(64, 128))) == [("o_proj", "row", (64,), 128)]


def test_modelopts_scales_have_four_dimensions():
    found = tensors(o_proj=GATE)
    found["model.layers.0.o_proj.weight_scale_inv"] = Tensor("F32", (12, 1, 2, 1), "")
    assert built(found) == [("o_proj", "row", (1536,), 256)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts.1.down_proj": None}, "has experts of different tensors"),
        ({"experts.0": None}, "or lacks some of its 2"),
        ({"experts.1.up_proj.weight_scale": None}, "is FP8 and has no scale such as"),
    ],
)
def test_what_is_missing(change, message):
    found = tensors(
        **{
            f"experts__{e}__{leaf}": DOWN if leaf == "down_proj" else GATE
            for e in (0, 1)
            for leaf in ("gate_proj", "up_proj", "down_proj")
        }
    )
    (gone,) = change
    found = {name: each for name, each in found.items() if gone not in name}
    with pytest.raises(UsageError, match=message):
        layers(found, BLOCKS, {})
