"""Nonsense in: a clear error out. ``make fuzz`` tries 10**5 of it."""

import contextlib
import io
import json
import math
import os
from argparse import Namespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_patch.cli import UsageError
from vllm_patch.cli.check import command, layers, plot, report
from vllm_patch.cli.check.checkpoint import Tensor, header
from vllm_patch.cli.check.quantization import Quantization
from vllm_patch.cli.check.stock import BACKENDS, PLATFORMS, Setting
from vllm_patch.cli.check.verdict import Verdict
from vllm_patch.releases import SUPPORTED

from .known_models import MODELS
from .test_command import FORMATS

ASKED = os.environ.get("FUZZ_EXAMPLES")
fuzz = settings(
    max_examples=int(ASKED or 200),
    # The same ones in each run, unless somebody looks for others.
    derandomize=ASKED is None,
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
QUANTIZED = sorted({key for valid in FORMATS.values() for key in valid})
PATTERNS = st.lists(
    st.one_of(
        st.text(max_size=8),
        # None that a match takes forever on: vLLM would, too.
        st.sampled_from(["re:(", "re:[", "re:*", "re:.*mlp.*", "*g*"]),
    ),
    max_size=3,
)
# Nothing, what could be, and what could not: most of it should get far.
LIKELY = st.sampled_from([1, 2, 4, 8, 64, 96, 128, 192, 320, 512, 1216, 1536])


def changes(names: list[str], *values) -> st.SearchStrategy:
    return st.one_of(
        st.just({}),
        st.dictionaries(st.sampled_from(names), LIKELY, max_size=2),
        st.dictionaries(st.sampled_from(names), st.one_of(VALUES, *values), max_size=3),
    )


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
    change=changes(FIELDS),
    quantized=st.sampled_from([*FORMATS.values()]),
    requantized=changes([*QUANTIZED, "modules_to_not_convert", "ignore"], PATTERNS),
    cut=st.integers(0, 4000),
    tp=TP,
    release=st.sampled_from(SUPPORTED),
    as_json=st.booleans(),
)
def test_configs(
    folder, base, change, quantized, requantized, cut, tp, release, as_json
):
    quantization = {**quantized, **requantized}
    text = json.dumps({**base, "quantization_config": quantization, **change})
    if cut < len(text) // 8:
        text = text[:cut]
    (folder / "config.json").write_text(text)
    checked(str(folder / "config.json"), tp, vllm_version=release, json=as_json)


FIELD = st.sampled_from(["dtype", "shape", "data_offsets", "other"])


@fuzz
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    change=st.one_of(
        st.none(), st.tuples(FIELD, st.one_of(VALUES, st.lists(NUMBERS, max_size=3)))
    ),
    length=st.one_of(st.none(), st.none(), st.integers(0, 2**64 - 1)),
    garbage=st.one_of(st.just(b""), st.just(b""), st.binary(max_size=24)),
    cut=st.one_of(st.none(), st.none(), st.integers(0, 200)),
)
def test_headers(folder, shapes, change, length, garbage, cut):
    entries, offset = {}, 0
    for number, shape in enumerate(shapes):
        place = [offset, offset := offset + math.prod(shape)]
        entry = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": place}
        entries[f"{number}"] = entry
    if change and entries:
        entries["0"] = {**entries["0"], change[0]: change[1]}
    text = garbage + json.dumps(entries).encode()
    size = len(text) if length is None else length
    data = size.to_bytes(8, "little") + text + bytes(offset)
    file = folder / "model.safetensors"
    file.write_bytes(data if cut is None else data[:cut])
    try:
        tensors = header(file)
    except UsageError as error:
        assert str(file) in str(error)
        return
    assert all(tensor.bytes >= 0 for tensor in tensors.values())


SIZES = st.sampled_from([1, 64, 100, 128, 192, 256, 320, 704, 1216, 1536, 4096])


def of_experts(inner: int, hidden: int, several: int) -> dict[str, tuple[int, ...]]:
    leaves = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    leaves["down_proj"] = hidden, inner
    numbers = range(several)
    return {f"experts.{n}.{leaf}": leaves[leaf] for n in numbers for leaf in leaves}


# Tensors of a kind of layer, by two sizes and a small number.
KINDS = (
    lambda n, h, k: {"gate_proj": (n, h), "up_proj": (n, h), "down_proj": (h, n)},
    lambda n, h, k: {"w1": (n, h), "w3": (n, h), "w2": (h, n)},
    of_experts,
    lambda n, h, k: {f"experts.{i}.w2": (h, n) for i in range(k)},
    lambda n, h, k: {
        "experts.gate_up_proj": (k, 2 * n, h),
        "experts.down_proj": (k, h, n),
    },
    lambda n, h, k: {"q_proj": (k * n, h), "k_proj": (n, h), "v_proj": (n, h)},
    lambda n, h, k: {
        "q_a_proj": (n, h),
        "kv_a_proj_with_mqa": (h, h),
        "q_b_proj": (h, n),
    },
    lambda n, h, k: {
        "in_proj_qkv": (2 * n + h, h),
        "in_proj_z": (h, h),
        "o_proj": (h, n),
    },
    lambda n, h, k: {"gate_up_proj": (2 * n, h), "other": (n, h), "indexer.wk": (n, h)},
    lambda n, h, k: {"down_proj": (h, n)},
)
SHAPE = st.lists(
    st.sampled_from([0, 1, 64, 128, 2**23, 2**40]), min_size=1, max_size=4
).map(tuple)


@fuzz
@given(
    groups=st.lists(
        st.tuples(st.sampled_from(KINDS), SIZES, SIZES, st.integers(1, 4)), max_size=3
    ),
    odd=st.one_of(st.none(), st.none(), st.tuples(st.integers(0, 9), SHAPE)),
    bad_scale=st.one_of(st.none(), st.none(), SHAPE),
    fields=st.one_of(
        st.just({"head_dim": 64, "linear_num_key_heads": 1, "linear_key_head_dim": 64}),
        changes(["head_dim", "num_attention_heads", "hidden_size", "hidden_act"]),
    ),
    block=st.sampled_from([(128, 128), (128, 64), (8, 8), (64, 64)]),
    name=st.sampled_from([*FORMATS]),
    tp=TP,
    backend=st.sampled_from(BACKENDS),
    platform=st.sampled_from(PLATFORMS),
    release=st.sampled_from(SUPPORTED),
)
def test_shapes(
    groups, odd, bad_scale, fields, block, name, tp, backend, platform, release
):
    shapes = {
        f"m.layers.{number}.{leaf}": shape
        for number, (kind, *sizes) in enumerate(groups)
        for leaf, shape in kind(*sizes).items()
    }
    if odd and shapes:
        shapes[[*shapes][odd[0] % len(shapes)]] = odd[1]
    tensors = {}
    for module, shape in shapes.items():
        rows = [-(-n // b) for n, b in zip(shape[-2:], block, strict=False)]
        tensors[f"{module}.weight"] = Tensor("F8_E4M3", shape, "a")
        scale = Tensor("F32", (*shape[:-2], *rows), "a")
        tensors[f"{module}.weight_scale_inv"] = scale
    if bad_scale and tensors:
        tensors[[*tensors][1]] = Tensor("F32", bad_scale, "a")
    how = Quantization(name, block)
    try:
        model = layers.layers(tensors, how, fields)
    except UsageError as error:
        assert "again" in str(error)
        return
    setting = Setting(release, tp, platform, backend, name, block)
    said = Verdict(model, fields, setting)
    assert report.text("x", "headers", how, [said]) and said.code in (0, 1, 2)
    assert json.dumps(report.as_json("x", "headers", how, [said], 0))
    for row in said.rows:
        if any(each.parts > 1 for each in row.cut) and row.is_taken:
            assert plot.drawing(row).startswith("<svg")
