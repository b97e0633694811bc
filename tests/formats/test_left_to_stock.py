"""Stock vLLM's errors about layers that are left to it say why, and what to do."""

import contextlib
import importlib

import pytest
import torch

from tests.fp8_tp_padding import experts
from tests.fp8_tp_padding.experts import PREFIX, Checkpoint
from tests.fp8_tp_padding.test_linear_loading import HIDDEN, build, load, matrix
from vllm_patch.formats.left_to_stock import IS_OFF, SMALLER_TP, explain, explained
from vllm_patch.patch_table import PATCHES

from .configs import FORMATS

TP = 8
LAYER = "model.layers.0.layer"
ROW = {"input_size": 1536, "output_size": HIDDEN, "bias": False}
COLUMN = {"input_size": HIDDEN, "output_size": 1536, "bias": False}
MERGED = {"input_size": HIDDEN, "output_sizes": [1536, 1536], "bias": False}
BLOCK_K = "Weight input_size_per_partition = 192 is not divisible by weight quantizat"
BLOCK_N = "Weight output_partition_size = 192 is not divisible by weight quantization"


@pytest.fixture
def off(monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "off")


def plain(blocks=(128, 128)):
    """Return the config of plain FP8."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    return Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[*blocks])


def line(layer: str, why: str) -> str:
    return f"vllm_patch left {layer} to stock vLLM: {why}"


def raised(make, *args, **kwargs) -> list[str]:
    """Return the lines of what vLLM raises."""
    with pytest.raises((ValueError, RuntimeError)) as caught:
        make(*args, **kwargs)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"hidden": 320}, "hidden size 320 is not a multiple of 128 either"),
        ({"weight_block_size": (128, 64)}, "the blocks are not square"),
    ],
)
def test_experts(plugin, kwargs, why):
    """640 / 8 = 80 columns: too few for vLLM's smaller blocks, too."""
    first, last = raised(experts.build, 640, TP, 1, **kwargs)
    assert first.startswith("The output_size of gate's and up's weight = 80 is not div")
    assert last == line(PREFIX, f"{why}. {SMALLER_TP}, or expert parallelism.")


@pytest.mark.parametrize("name", ["fp8", *(n for n in FORMATS if n != "inc")])
def test_experts_while_it_is_off(plugin, off, name):
    if name != "fp8" and not FORMATS[name].cut_experts:
        pytest.skip(f"{name} has no experts in FP8 blocks")
    if name != "fp8" and not FORMATS[name].is_in_release:
        pytest.skip(f"this release has no {name} in FP8 blocks")
    make = None if name == "fp8" else FORMATS[name].quant_config
    first, last = raised(experts.build, 640, TP, 1, quant_config=make)
    assert "not divisible by weight quantization block_n = 128." in first
    assert last == line(PREFIX, IS_OFF)


def test_a_backend_that_there_is_not(plugin):
    """As vLLM 0.29+ finds none for its smaller blocks, and notices late."""
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend

    if experts.vllm_version() < (0, 29):
        pytest.skip("this release asserts before it needs a backend")
    layer = experts.build(1536, TP, 1, hidden=320)
    layer.quant_method.fp8_backend = Fp8MoeBackend.NONE
    first, last = raised(experts.process, layer, TP, 1)
    assert first == "Unsupported FP8 MoE backend: NONE"
    assert last.startswith(line(PREFIX, "hidden size 320 is not a multiple of 128 "))


def test_a_backend_that_takes_no_smaller_blocks(plugin, off):
    """Vllm 0.29 and 0.30 ask for them before they know a layer's kernel."""
    if experts.vllm_version() not in ((0, 29), (0, 30)):
        pytest.skip("this release says that it is not divisible")
    first, last = raised(experts.build, 1536, TP, 1, backend="marlin")
    assert "does not support the deployment configuration" in first
    assert last == line(PREFIX, IS_OFF)


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("RowParallelLinear", ROW, BLOCK_K),
        ("ColumnParallelLinear", COLUMN, BLOCK_N),
    ],
)
def test_linear_layers_while_it_is_off(plugin, off, kind, sizes, message):
    first, last = raised(build, kind, TP, 1, **sizes)
    assert first.startswith(message)
    assert last == line(LAYER, IS_OFF)


def test_merged_layers_that_fail_while_they_load(plugin, off):
    layer = build("MergedColumnParallelLinear", TP, 1, **MERGED)
    tensors = {i: matrix(1536, HIDDEN, seed=i) for i in (0, 1)}
    first, last = raised(load, layer, tensors)
    assert first == "start (2) + length (2) exceeds dimension size (3)."
    assert last == line(LAYER, IS_OFF)


def test_linear_layers_of_other_formats(of_linear, off):
    make = of_linear.quant_config
    first, last = raised(build, "RowParallelLinear", TP, 1, quant_config=make, **ROW)
    assert first.startswith((BLOCK_K, "FP8_PB_WO requires in divisible by 128, got"))
    assert last == line(LAYER, IS_OFF)


def test_a_format_that_is_taken_over_in_later_releases(plugin):
    """ModelOpt had another method for FP8_PB_WO; its per-tensor FP8 is not cut."""
    if experts.vllm_version() >= (0, 30):
        pytest.skip("this release is one of the later")
    make = FORMATS["modelopt"].quant_config
    first, last = raised(build, "RowParallelLinear", TP, 1, quant_config=make, **ROW)
    assert first.startswith("ModelOpt FP8_PB_WO requires in_features divisible by 128")
    why = "such checkpoints are padded from vLLM 0.30.0 on"
    assert last == line(LAYER, f"{why}. {SMALLER_TP}.")

    def per_tensor():
        config = FORMATS["modelopt"].config()
        return type(make()).from_config({**config, "quant_algo": "FP8"})

    for each in (make, per_tensor):
        total = 1536 if each is per_tensor else 1024
        sizes = {**ROW, "input_size": total}
        layer = build("RowParallelLinear", TP, 1, quant_config=each, **sizes)
        assert "create_weights" not in vars(layer.quant_method)


def test_quark_in_the_release_before_it_is_taken_over(plugin):
    """It has per-block linear layers, and no experts."""
    if experts.vllm_version() != (0, 29):
        pytest.skip("this release has no Quark in blocks, or is one of the later")
    config = FORMATS["quark"].quant_config
    first, last = raised(build, "RowParallelLinear", TP, 1, quant_config=config, **ROW)
    assert first.startswith(BLOCK_K)
    assert "such checkpoints are padded from vLLM 0.30.0 on" in last


def test_rows_of_later_releases_do_not_warn(plugin, caplog):
    for row in PATCHES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(row.module)
    assert not [r for r in caplog.records if r.name == "vllm.vllm_patch"]


def test_blocks_that_are_not_square(plugin):
    def make():
        return plain([64, 128])

    first, last = raised(build, "RowParallelLinear", TP, 1, quant_config=make, **ROW)
    assert first.startswith(BLOCK_K)
    assert last == line(LAYER, f"the blocks [64, 128] are not square. {SMALLER_TP}.")


def test_layers_with_a_loader_of_their_own(plugin, monkeypatch):
    from vllm.model_executor.layers import linear

    class OthersLinear(linear.RowParallelLinear):
        def weight_loader_v2(self, *args):
            raise AssertionError("not called")

    monkeypatch.setattr(linear, "OthersLinear", OthersLinear, raising=False)
    first, last = raised(build, "OthersLinear", TP, 1, **ROW)
    assert first.startswith(BLOCK_K)
    why = "OthersLinear loads weights in a way of its own"
    assert last == line(LAYER, f"{why}. {SMALLER_TP}.")


def test_groups_that_nobody_pads(plugin):
    """MXFP8 experts of 80 columns, in the releases whose own check comes first."""
    from vllm.model_executor.layers.quantization.modelopt import ModelOptMxFp8Config

    def make():
        return ModelOptMxFp8Config.from_config(
            {
                "quantization": {
                    "quant_algo": "MXFP8",
                    "exclude_modules": [],
                    "kv_cache_quant_algo": "FP8",
                }
            }
        )

    first, last = raised(experts.build, 640, TP, 1, quant_config=make)
    assert "intermediate_size_per_partition divisible by 32" in first
    assert last.startswith(
        line(PREFIX, "it pads FP8 in blocks only, not groups of 32. Use a tensor-")
    )


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_layers_that_are_not_cut_are_untouched(plugin, monkeypatch, mode):
    """Their methods are vLLM's, and so is all that these hold."""
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", mode)
    layers = [
        experts.build(1024, TP, 1),
        experts.build(1536, TP, 1, expert_parallel=True, experts=8),
        build("RowParallelLinear", TP, 1, **{**ROW, "input_size": 1024}),
        build("ReplicatedLinear", TP, 1, **ROW),
    ]
    for layer in layers:
        assert type(layer.quant_method).__module__.startswith("vllm.")
        for name in ("create_weights", "process_weights_after_loading"):
            assert name not in vars(layer.quant_method)
        for param in layer.parameters():
            loader = getattr(param, "weight_loader", layer.weight_loader)
            assert not hasattr(loader, "__wrapped__")


def test_experts_that_vllm_loads_in_smaller_blocks_still_do(plugin, off):
    if experts.vllm_version() < (0, 29):
        pytest.skip("this release has no smaller blocks")
    layer = experts.build(1536, TP, 1)
    assert layer.w13_weight.weight_loader.supports_moe_loading
    experts.load(layer, Checkpoint.random(1536))
    experts.process(layer, TP, 1)
    assert layer.quant_method.moe_block_shape == [64, 64]


def test_functions_of_other_plugins_are_untouched():
    """They set them on the method, and take no self."""

    class Method:
        def process_weights_after_loading(self, layer):
            raise ValueError("192 is not divisible by 128")

    def create_weights(*args, **kwargs):
        return args, kwargs

    method = Method()
    method.create_weights = create_weights
    explain(method, "a", "b")
    assert method.create_weights is create_weights
    with pytest.raises(ValueError, match=line("a", "b")):
        method.process_weights_after_loading(None)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("Unknown activation"),
        KeyError("x is not divisible by y"),
    ],
    ids=repr,
)
def test_other_errors_stay_as_they_are(error):
    before = str(error)
    with pytest.raises(type(error)) as caught, explained("layer", "why"):
        raise error
    assert caught.value is error and str(error) == before


def test_a_line_is_added_once_and_to_the_error_itself():
    error = ValueError("192 is not divisible by 128")
    with pytest.raises(ValueError) as caught, explained("a", "b"), explained("a", "b"):
        raise error
    assert caught.value is error
    assert str(error) == f"192 is not divisible by 128\n{line('a', 'b')}"


@pytest.mark.parametrize("name", ["fp8", *FORMATS])
def test_a_layer_that_is_left_shares_its_method_with_none(plugin, off, name):
    """What one config makes for two layers, of which one is cut."""
    if name != "fp8" and not FORMATS[name].is_in_release:
        pytest.skip(f"this release has no {name} in FP8 blocks")
    if name != "fp8" and not FORMATS[name].cut_linear:
        pytest.skip(f"{name} has no linear layers in FP8 blocks")
    configs = []

    def make():
        if not configs:
            configs.append(FORMATS[name].quant_config() if name != "fp8" else plain())
        return configs[0]

    raised(build, "RowParallelLinear", TP, 1, quant_config=make, **ROW)
    whole = {**ROW, "input_size": 1024}
    layer = build("RowParallelLinear", TP, 1, quant_config=make, **whole)
    method = layer.quant_method
    method = getattr(getattr(method, "scheme", None), "linear_method", method)
    assert "create_weights" not in vars(method)
