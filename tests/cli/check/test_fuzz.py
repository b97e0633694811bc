"""Nonsense in: a clear error out. ``make fuzz`` tries 10**5 of it."""

import contextlib
import io
import json
import os
from argparse import Namespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_patch.cli import UsageError
from vllm_patch.cli.check import command, layers, plot, report
from vllm_patch.cli.check.checkpoint import Tensor, header
from vllm_patch.cli.check.quantization import Quantization
from vllm_patch.cli.check.stock import BACKENDS, FORMATS, PLATFORMS, Setting
from vllm_patch.cli.check.verdict import Verdict
from vllm_patch.releases import SUPPORTED

from .known_models import MODELS, QUANTIZATION

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
fuzz = settings(
    max_examples=EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
NUMBERS = st.one_of(
    st.integers(-2, 600),
    st.sampled_from([0, 64, 96, 128, 1408, 1536, 2**31, 2**63, 10**400, -(2**63)]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=8)),
    lambda each: st.one_of(
        st.lists(each, max_size=3),
        st.dictionaries(st.sampled_from(["a", "weights", "type"]), each, max_size=3),
    ),
    max_leaves=6,
)
FIELDS = sorted(
    {name for fields in MODELS.values() for name in fields}
    | {"text_config", "layer_types", "mlp_only_layers", "moe_layer_freq"}
    | {"moe_layers_enum", "attention_other_setting", "decoder_sparse_step"}
    | {"hidden_act", "quantization_config", "full_attention_interval"}
)
QUANTIZED = ["quant_method", "weight_block_size", "config_groups", "bits", "group_size"]
PATTERNS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(["re:(.*)*x", "re:" + ".*" * 9, "re:(", "re:.*mlp.*", "*g*"]),
    ),
    max_size=3,
)
QUANTIZED += ["modules_to_not_convert", "ignore", "quantized_layers", "quant_algo"]
QUANTIZED += ["global_quant_config", "exclude", "data_type"]
METHODS = st.sampled_from([*FORMATS, "auto-round", "awq", "mxfp8"])
SMALL = [{**fields, "num_hidden_layers": 4} for fields in MODELS.values()]
TP = st.sampled_from([1, 2, 3, 8, 16, 64, 1024])


def checked(model: str, tp: int, **others) -> int | None:
    """Run the command; return its code, or None for a clear error."""
    asked = {"tp": [tp], "all": False, "vllm_version": None, "json": False}
    asked |= {"platform": PLATFORMS[0], "moe_backend": BACKENDS[0], "plot": None}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = command.run(Namespace(model=model, **{**asked, **others}))
        except UsageError as error:
            assert str(error)
            return None
    assert out.getvalue() and code in (0, 1, 2)
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(
    base=st.sampled_from(SMALL),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
    quantization=st.dictionaries(
        st.sampled_from(QUANTIZED), st.one_of(VALUES, PATTERNS), max_size=3
    ),
    method=METHODS,
    cut=st.integers(0, 4000),
    tp=TP,
    release=st.sampled_from(SUPPORTED),
    as_json=st.booleans(),
)
def test_configs(
    folder, base, changes, quantization, method, cut, tp, release, as_json
):
    quantized = {**QUANTIZATION, "quant_method": method, **quantization}
    fields = {**base, "quantization_config": quantized, **changes}
    text = json.dumps(fields)
    if cut < len(text) // 8:
        text = text[:cut]
    (folder / "config.json").write_text(text)
    checked(str(folder / "config.json"), tp, vllm_version=release, json=as_json)


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F8_E4M3", "F32", "BF16"]), VALUES),
        "shape": st.one_of(st.lists(NUMBERS, max_size=3), VALUES),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), VALUES),
    }
)


@fuzz
@given(
    entries=st.dictionaries(
        st.text(max_size=6), st.one_of(ENTRIES, VALUES), max_size=3
    ),
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1), st.integers(0, 400)),
    garbage=st.binary(max_size=24),
    tail=st.integers(0, 600),
    cut=st.one_of(st.none(), st.integers(0, 200)),
)
def test_headers(folder, entries, length, garbage, tail, cut):
    text = json.dumps(entries).encode()
    text = garbage + text if length == 0 else text
    size = len(text) if length is None else length
    data = size.to_bytes(8, "little") + text + bytes(tail)
    file = folder / "model.safetensors"
    file.write_bytes(data if cut is None else data[:cut])
    try:
        tensors = header(file)
    except UsageError as error:
        assert str(file) in str(error)
        return
    assert all(tensor.bytes >= 0 for tensor in tensors.values())


LEAVES = st.sampled_from(
    [
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj"),
        *("down_proj", "gate_up_proj", "w1", "w2", "w3", "q_a_proj", "q_b_proj"),
        *("kv_a_proj_with_mqa", "kv_b_proj", "in_proj_qkvz", "in_proj_qkv"),
        *("in_proj_z", "out_proj", "wo_a", "wo_b", "wq_b", "gate", "other"),
    ]
)
PARENTS = st.sampled_from(
    ["m.layers.0.mlp", "m.layers.1.self_attn", "m.layers.0.mlp.experts"]
    + [f"m.layers.0.mlp.experts.{n}" for n in (0, 1, 7)]
    + ["m.layers.0.self_attn.indexer", "mtp.layers.0", "", "x.experts.9999999"]
)
CONFIGURED = "head_dim", "num_attention_heads", "hidden_size"
SIZES = st.sampled_from([0, 1, 64, 100, 128, 192, 256, 320, 1536, 2**40])


@fuzz
@given(
    shapes=st.dictionaries(
        st.tuples(PARENTS, LEAVES),
        st.lists(SIZES, min_size=1, max_size=4).map(tuple),
        max_size=5,
    ),
    bad_scale=st.sampled_from([None, (), (1,), (2, 2), (3, 1, 4, 1)]),
    fields=st.fixed_dictionaries(
        {},
        optional={
            n: NUMBERS for n in ("head_dim", "num_attention_heads", "hidden_size")
        },
    ),
    block=st.sampled_from([(128, 128), (128, 64), (8, 8), (64, 64)]),
    name=st.sampled_from([*FORMATS]),
    tp=TP,
    backend=st.sampled_from(BACKENDS),
    platform=st.sampled_from(PLATFORMS),
)
def test_shapes(shapes, bad_scale, fields, block, name, tp, backend, platform):
    tensors = {}
    for (parent, leaf), shape in shapes.items():
        module = f"{parent}.{leaf}"
        rows = [-(-n // b) for n, b in zip(shape[-2:], block, strict=False)]
        scale = (*shape[:-2], *rows) if bad_scale is None else bad_scale
        tensors[f"{module}.weight"] = Tensor("F8_E4M3", shape, "a")
        tensors[f"{module}.weight_scale_inv"] = Tensor("F32", scale, "a")
    how = Quantization(name, block)
    try:
        model = layers.layers(tensors, how, fields)
    except UsageError as error:
        assert "again" in str(error)
        return
    setting = Setting(SUPPORTED[-1], tp, platform, backend, name, block)
    said = Verdict(model, fields, setting)
    assert report.text("x", "headers", how, [said]) and said.code in (0, 1, 2)
    assert json.dumps(report.as_json("x", "headers", how, [said]))
    for row in said.rows:
        if row.cut and row.is_taken:
            assert plot.drawing(row).startswith("<svg")
