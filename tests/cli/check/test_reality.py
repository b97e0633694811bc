"""That ``check`` says what vLLM does: its real classes, on every rank, both ways."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.formats.configs import FORMATS
from tests.fp8_tp_padding import experts
from tests.fp8_tp_padding.experts import BLOCK, dequantize
from tests.fp8_tp_padding.test_linear_loading import build, matrix
from vllm_patch.cli.check import quantization
from vllm_patch.cli.check.layers import Layer, Layers
from vllm_patch.cli.check.ours import ours
from vllm_patch.cli.check.stock import (
    CPU,
    DEEP_GEMM,
    LINEAR_ONLY,
    Setting,
    unserved,
)
from vllm_patch.cli.check.verdict import Verdict

NAMES = "fp8", *FORMATS
MIXED = "modelopt-mixed"
MIXED_LINEAR = replace(
    FORMATS["modelopt"],
    row=MIXED,
    source={
        **FORMATS[MIXED].config(),
        "quantized_layers": {"model.layers.0.layer": {"quant_algo": "FP8_PB_WO"}},
    },
)
# Experts of each: whole blocks, half ones (refined to 64), a fourth (32), g = 16, five
# blocks on eight ranks, eleven (odd leads), a partial last block, over four blocks.
TOTALS = 1024, 1536, 2304, 640, 1408, 704, 5376
HIDDEN = 256
# Rows or columns: whole blocks at all sizes, then as above; 10944 is 85.5 blocks.
SIZES = 1024, 640, 2200, 10944
LINEAR = [
    *(Layer("column", "column", (n,), HIDDEN) for n in SIZES),
    *(Layer("row", "row", (HIDDEN,), n) for n in SIZES),
    *(Layer("merged", "merged", (n, n), HIDDEN) for n in SIZES),
    # Shards of different sizes, small ones, and one inside a block.
    Layer("merged", "merged", (512, 512, 1024, 1024), HIDDEN),
    Layer("merged", "merged", (64, 64, 64), HIDDEN),
    Layer("merged", "merged", (1024, 192), HIDDEN),
    # Heads of 128 and 64; KV heads on each rank, on several, and one on all.
    Layer("qkv", "qkv", (1024, 1024, 1024), HIDDEN, kv_heads=8),
    Layer("qkv", "qkv", (2048, 256, 256), HIDDEN, kv_heads=2),
    Layer("qkv", "qkv", (1536, 512, 512), HIDDEN, kv_heads=8),
    Layer("qkv", "qkv", (1536, 128, 128), HIDDEN, kv_heads=2),
    Layer("qkv", "qkv", (1536, 64, 64), HIDDEN, kv_heads=1),
    # DeepSeek's q_a and kv_a, of which every rank has all.
    Layer("replicated", "replicated", (256, 576), HIDDEN),
    Layer("replicated", "replicated", (192, 256), HIDDEN),
    Layer("replicated", "replicated", (576,), HIDDEN),
]


@pytest.fixture(params=NAMES)
def format_name(request):
    if request.param in FORMATS and not FORMATS[request.param].is_in_release:
        pytest.skip(f"this release has no {request.param} in FP8 blocks")
    return request.param


def verdict(layer: Layer, tp: int, name: str, backend="auto") -> Verdict:
    import vllm

    release = vllm.__version__
    setting = Setting(release, tp, "hopper", backend, name, (BLOCK, BLOCK))
    model = Layers()
    model.found[layer] = 1
    gated = len(layer.outputs) > 1
    text = {"hidden_act": "silu"} if gated else {"mlp_hidden_act": "relu2"}
    return Verdict(model, text, setting)


def scale_name(name: str) -> str:
    return FORMATS[name].scale if name in FORMATS else "weight_scale_inv"


def quant_config(name: str):
    return FORMATS[name].quant_config if name in FORMATS else None


def bytes_of(layer) -> int:
    """Bytes of what the layer allocated for weights and scales."""
    return sum(p.numel() * p.element_size() for p in layer.parameters())


def arguments(layer: Layer) -> tuple[str, dict]:
    """Return vLLM's class for a layer and what it takes."""
    if layer.kind == "qkv":
        head = layer.outputs[1] // layer.kv_heads
        return "QKVParallelLinear", {
            "hidden_size": layer.inputs,
            "head_size": head,
            "total_num_heads": layer.outputs[0] // head,
            "total_num_kv_heads": layer.kv_heads,
        }
    if layer.kind == "merged" or len(layer.outputs) > 1:
        kwargs = {"input_size": layer.inputs, "output_sizes": list(layer.outputs)}
        if layer.kind == "replicated":
            kwargs["disable_tp"] = True
        return "MergedColumnParallelLinear", kwargs
    kinds = {
        "column": "ColumnParallelLinear",
        "row": "RowParallelLinear",
        "replicated": "ReplicatedLinear",
    }
    return kinds[layer.kind], {
        "input_size": layer.inputs,
        "output_size": layer.outputs[0],
    }


def tensors_of(layer: Layer) -> dict:
    """Return weight and scales of each shard, by vLLM's name for it."""
    ids = "qkv" if layer.kind == "qkv" else range(len(layer.outputs))
    ids = [None] if len(layer.outputs) == 1 else ids
    shards = zip(ids, layer.outputs, strict=True)
    return {i: matrix(rows, layer.inputs, seed=n) for n, (i, rows) in enumerate(shards)}


def real_linear(layer: Layer, tp: int, rank: int, name: str):
    """Return a rank's layer, loaded."""
    kind, kwargs = arguments(layer)
    make = quant_config(name)
    made = build(kind, tp, rank, torch.float32, quant_config=make, bias=False, **kwargs)
    shape = FORMATS[name].shape if name in FORMATS else lambda scale: scale
    scales = getattr(made, scale_name(name))
    for shard_id, (weight, scale) in tensors_of(layer).items():
        ids = () if shard_id is None else (shard_id,)
        made.weight.weight_loader(made.weight, weight, *ids)
        scales.weight_loader(scales, shape(scale), *ids)
    return made


def has_its_scales(made, layer: Layer, tp: int, rank: int, name: str) -> bool:
    """Whether a rank's rows, with scales where kernels look, are the checkpoint's."""
    dim = 1 if layer.kind == "row" else 0
    parts = []
    for tensors, each in zip(
        tensors_of(layer).values(), layer.dimensions(tp), strict=True
    ):
        start = rank // each.replicas * each.size
        parts.append(dequantize(*tensors).narrow(dim, start, each.size))
    scale = getattr(made, scale_name(name)).data
    if scale.ndim == 4:
        scale = scale[:, 0, :, 0]
    return torch.equal(dequantize(made.weight.data, scale), torch.cat(parts))


def some_of(tp: int) -> list[int]:
    """The first ranks, of an even and an odd lead, and the last."""
    return sorted({0, 1, tp - 1} & {*range(tp)})


def outcome(make, *args) -> tuple[str, object]:
    try:
        return "", make(*args)
    except (ValueError, RuntimeError, IndexError, AssertionError) as error:
        # Where the plugin is on, its own line follows vLLM's text.
        text, _, _ = str(error).partition("\nvllm_patch left ")
        return text or type(error).__name__, None


def routed(total: int, hidden=HIDDEN, gated=True) -> Layer:
    outputs = (total, total) if gated else (total,)
    return Layer("experts", "experts", outputs, hidden, experts=2)


def expert_cases():
    """All of plain FP8; of the others what the formats differ in."""
    for total in TOTALS:
        for tp in (2, 8):
            yield "fp8", routed(total), tp, "auto"
        yield "fp8", routed(total), 8, "triton"
    # 320 + 192 columns share no block of 128; of 320 / 2, all are refined to 32.
    yield "fp8", routed(1536, hidden=320), 8, "auto"
    yield "fp8", routed(640, hidden=320), 2, "triton"
    yield "fp8", routed(1536, gated=False), 8, "auto"
    # A rank has all of them, and they end inside a block.
    yield "fp8", routed(704), 1, "auto"
    for name in (name for name in FORMATS if FORMATS[name].cut_experts):
        for total in (1024, 1536, 640):
            yield name, routed(total), 8, "auto"
        yield name, routed(640), 8, "triton"


@pytest.mark.parametrize(
    ("format_name", "layer", "tp", "backend"),
    expert_cases(),
    indirect=["format_name"],
    ids=lambda x: f"{x.outputs}-{x.inputs}" if isinstance(x, Layer) else None,
)
def test_experts(format_name, layer, tp, backend, monkeypatch, plugin):
    (row,) = verdict(layer, tp, format_name, backend).rows

    def make(rank):
        gated = len(layer.outputs) == 2
        kwargs = {} if gated else experts.ungated()
        return experts.build(
            layer.outputs[0],
            tp,
            rank,
            hidden=layer.inputs,
            backend=backend,
            quant_config=quant_config(format_name),
            **kwargs,
        )

    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "off")
    for rank in some_of(tp):
        error, made = outcome(make, rank)
        if not row.stock.runs:
            assert error == row.stock.text
            continue
        assert not error
        method = made.quant_method
        refined = getattr(method, "weight_scale_refine", None) is not None
        shared = getattr(method.moe, "tp_shard_with_padding", False)
        kind = "refined" if refined else "shared" if shared else "fine"
        assert row.stock.kind == kind
        if refined:
            assert method.moe_block_shape == [row.stock.block] * 2
        assert bytes_of(made) == row.bytes(rank, "stock")
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "auto")
    for rank in some_of(tp):
        error, made = outcome(make, rank)
        assert bool(error) == (not row.runs), error
        if error:
            continue
        method = made.quant_method
        kind = getattr(method, "store", None)
        kind = "stock" if kind is None else type(kind).__name__.lower()
        assert kind == ("stock" if row.ours.kind == "left" else row.ours.kind)
        if kind == "padded" and "up to" in row.ours.why:
            assert row.ours.why == method.store.because
        assert bytes_of(made) == row.bytes(rank, "ours")


@pytest.mark.parametrize(
    ("text", "kwargs"),
    [
        ({"hidden_activation": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"hidden_act": "gelu"}, {"activation": "gelu"}),
        ({"hidden_act": "silu", "swiglu_limit": 7.0}, {"swiglu_limit": 7.0}),
        ({"swiglu_limits": [0, 7.0]}, {"activation": "swiglustep"}),
        ({"hidden_act": "swigluoai"}, {"activation": "swigluoai_uninterleave"}),
    ],
)
def test_activations(plugin, text, kwargs):
    layer, setting = routed(1536), verdict(routed(1536), 8, "fp8").setting
    store = experts.build(1536, 8, 1, hidden=HIDDEN, **kwargs).quant_method.store
    found = ours(layer, setting, text)
    assert found.kind == type(store).__name__.lower()
    assert found.why == getattr(store, "because", "")


@pytest.mark.parametrize("format_name", LINEAR_ONLY, indirect=True)
@pytest.mark.parametrize("total", [1024, 1536])
def test_experts_of_formats_without(format_name, total, plugin):
    """Refused by vLLM, or without a place for their scales, cut or not."""
    found = verdict(routed(total), 8, format_name)
    assert not found.rows[0].runs
    kwargs = {"hidden": HIDDEN, "quant_config": quant_config(format_name)}
    error, made = outcome(lambda: experts.build(total, 8, 0, **kwargs))
    if made is not None:
        names = dict(made.named_parameters())
        scales = next(p for n, p in names.items() if "w13" in n and "weight_scale" in n)
        assert scales.numel() < 2 * 2 * total // 8 // BLOCK * (HIDDEN // BLOCK)
    assert not any(each.startswith(("TP ", "--")) for each in found.ways_out())


@pytest.mark.parametrize(("heads", "tp"), [(64, 64), (96, 64), (96, 32), (8, 16)])
def test_heads_of_a_layer(heads, tp):
    """Step-3.5's layers with a sliding window have 96, others 64."""
    layer = Layer("qkv", "qkv", (heads * 128, 1024, 1024), HIDDEN, kv_heads=8)
    error, _ = outcome(real_linear, layer, tp, 0, "fp8")
    assert bool(layer.undivided(tp)) == bool(error) == (heads % tp != 0)


class Stop(Exception):
    """Instead of the choice of kernels, which are not on this machine."""


@pytest.mark.parametrize("total", [1536, 640, 1408, 704, 1000])
def test_deep_gemm(monkeypatch, total, backend=DEEP_GEMM):
    """How vLLM shares experts out for them, before it looks for their kernels."""
    from vllm.model_executor.layers.quantization import fp8

    (row,) = verdict(routed(total), 8, "fp8", backend).rows
    seen = []

    def stop(config, *_, weight_key=None, **__):
        seen.append((config, weight_key))
        raise Stop

    monkeypatch.setattr(fp8, "select_fp8_moe_backend", stop)
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "off")
    try:
        experts.build(total, 8, 0, hidden=HIDDEN, backend=backend)
    except ValueError as error:
        assert row.stock.text == str(error)
        return
    except Stop:
        ((config, weight_key),) = seen
    if row.stock.kind == "shared":
        assert config.tp_shard_with_padding
        assert config.intermediate_size_per_partition == row.stock.block
        return
    assert row.stock.kind == "error"
    blocks = [*weight_key.scale.group_shape]
    if "deployment configuration" in row.stock.text:
        assert blocks != [BLOCK, BLOCK]  # Which none of them takes.
    else:
        assert blocks == [BLOCK, BLOCK] and "not divisible" in row.stock.text


def test_what_deep_gemm_takes():
    """As its class in vLLM says."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.oracle import fp8
    from vllm.model_executor.layers.quantization.utils import quant_utils

    kernels = fp8.backend_to_kernel_cls(fp8.Fp8MoeBackend.DEEPGEMM)
    (kernels,) = kernels if isinstance(kernels, list) else [kernels]
    setting = verdict(routed(1024), 8, "fp8", DEEP_GEMM).setting
    assert unserved(routed(1024), setting, {}) is None
    is_served = unserved(routed(1024, gated=False), setting, {}) is None
    assert kernels._supports_no_act_and_mul() == is_served is False
    gelu = {"hidden_activation": "gelu_pytorch_tanh"}
    is_served = unserved(routed(1024), setting, gelu) is None
    assert kernels._supports_activation(MoEActivation.GELU_TANH) == is_served is False
    group = quant_utils.GroupShape(64, 64)
    weight = quant_utils.create_fp8_quant_key(static=True, group_shape=group)
    is_served = unserved(routed(1024), replace(setting, block=(64, 64)), {}) is None
    taken = kernels._supports_quant_scheme(weight, quant_utils.kFp8Dynamic128Sym)
    assert taken == is_served is False


@pytest.mark.parametrize("block", [(128, 128), (64, 64), (128, 64)])
def test_what_cpus_take(block):
    from vllm.model_executor.kernels.linear.scaled_mm import cpu
    from vllm.model_executor.layers.quantization.utils import quant_utils

    found = verdict(Layer("row", "row", (HIDDEN,), 1024), 1, "fp8")
    setting = replace(found.setting, platform=CPU, block=block)
    group = quant_utils.GroupShape(*block)
    weight = quant_utils.create_fp8_quant_key(static=True, group_shape=group)
    asked = SimpleNamespace(
        weight_quant_key=weight,
        activation_quant_key=quant_utils.kFp8Dynamic128Sym,
        out_dtype=torch.bfloat16,
    )
    taken, _ = cpu.CPUFp8BlockScaledMMKernel.can_implement(asked)
    assert taken == (unserved(*found.model.found, setting, {}) is None)


def linear_cases():
    """All of plain FP8; of the others what the formats differ in."""
    for layer in LINEAR:
        for tp in (1, 8):
            yield "fp8", layer, tp
    for name in (n for n in FORMATS if FORMATS[n].cut_linear or n == MIXED):
        for layer in LINEAR[1::3]:
            yield name, layer, 8


@pytest.mark.parametrize(
    ("format_name", "layer", "tp"),
    linear_cases(),
    indirect=["format_name"],
    ids=lambda x: f"{x.kind}-{x.outputs}-{x.inputs}" if isinstance(x, Layer) else None,
)
def test_linear_layers(format_name, layer, tp, monkeypatch, plugin):
    monkeypatch.setitem(FORMATS, MIXED, MIXED_LINEAR)
    (row,) = verdict(layer, tp, format_name).rows
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "off")
    errors, are_right = [], []
    for rank in range(tp):
        error, made = outcome(real_linear, layer, tp, rank, format_name)
        errors.append(error)
        if made is not None:
            place = layer, tp, rank, format_name
            are_right.append(has_its_scales(made, *place))
            assert bytes_of(made) == row.bytes(rank, "stock")
    failed = next(filter(None, errors), "")
    kind = "error" if failed else "fine" if all(are_right) else "wrong"
    assert row.stock.kind == kind
    assert not failed or failed == row.stock.text
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "auto")
    assert row.runs
    for rank in some_of(tp):
        made = real_linear(layer, tp, rank, format_name)
        method = made.quant_method
        method = getattr(getattr(method, "scheme", None), "linear_method", method)
        assert hasattr(method, "layout") == (row.ours.kind == "padded")
        assert bytes_of(made) == row.bytes(rank, "ours")


MLP = "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("listed", "module", "prefix"),
    [
        ({f"{MLP}.experts": ...}, "experts.up_proj", "experts"),
        ({f"{MLP}.experts.0.up_proj": ...}, "experts.down_proj", "experts"),
        ({f"{MLP}.gate_proj": ...}, "experts.gate_up_proj", "experts"),
        ({f"{MLP}.shared_expert.up_proj": ...}, "experts.up_proj", "experts"),
        (
            {f"{MLP}.experts.0.up_proj": "NVFP4", f"{MLP}.experts": ...},
            *("experts.up_proj", "experts"),
        ),
        (
            {f"{MLP}.down_proj": "NVFP4", f"{MLP}.experts.0.up_proj": ...},
            *("experts.up_proj", "experts"),
        ),
        (
            {f"{MLP}.down_proj": "NVFP4", f"{MLP}.up_proj": ...},
            *("experts.up_proj", "experts"),
        ),
        ({MLP: ...}, "experts.up_proj", "experts"),
        ({f"{MLP}.up_proj": ...}, "gate_proj", "gate_up_proj"),
        ({f"{MLP}.gate_up_proj": ...}, "gate_proj", "gate_up_proj"),
        ({MLP: ...}, "down_proj", "down_proj"),
        ({f"{MLP}.up_proj": ...}, "down_proj", "down_proj"),
    ],
)
def test_what_a_mixed_list_says(listed, module, prefix):
    """As vLLM looks up a layer, ``...`` standing for FP8 in blocks."""
    from vllm.model_executor.layers.quantization import modelopt

    if not FORMATS[MIXED].is_in_release:
        pytest.skip(f"this release has no {MIXED} in FP8 blocks")
    listed = {
        name: {"quant_algo": "FP8_PB_WO" if algorithm is ... else algorithm}
        for name, algorithm in listed.items()
    }
    found = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    found["quantized_layers"] = listed
    config = modelopt.ModelOptMixedPrecisionConfig.from_config(found)
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    said = config._resolve_quant_algo(f"{MLP}.{prefix}") == "FP8_PB_WO"
    how = quantization.read({"quantization_config": found}, "config.json")
    assert how.takes(f"{MLP}.{module}") == said
