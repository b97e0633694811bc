"""Files and sizes that cannot be right, by vLLM's own loader: clear errors, no load."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.fp8_tp_padding import experts
from tests.fp8_tp_padding.experts import BLOCK, FP8, PREFIX, SHARDS, Checkpoint
from tests.fp8_tp_padding.tensor_parallel import rank_of
from tests.fp8_tp_padding.test_linear_loading import HIDDEN, build, load, matrix

TOTAL, TP = 1536, 8
# What config.json says of an expert's projections -> what vLLM calls them.
NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.fixture(autouse=True)
def registered(plugin):
    """The plugin, in all of these."""


@pytest.fixture
def layer():
    return experts.build(TOTAL, TP, 3)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint in two files, weights and scales, with their index."""
    checkpoint = Checkpoint.random(TOTAL)
    files = {"a.safetensors": {}, "b.safetensors": {}}
    for projection, shard in NAMES.items():
        for expert in (0, 1):
            name = f"{PREFIX}.{expert}.{projection}"
            weight = checkpoint.weights[shard][expert].clone()
            scale = checkpoint.scales[shard][expert].clone()
            files["a.safetensors"][f"{name}.weight"] = weight
            files["b.safetensors"][f"{name}.weight_scale_inv"] = scale
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
    places = {key: name for name, tensors in files.items() for key in tensors}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return tmp_path


def load_folder(layer, folder: Path) -> None:
    """Load a layer as vLLM's default loader and models do, and process it."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = DefaultModelLoader(LoadConfig(use_tqdm_on_load=False))
    source = DefaultModelLoader.Source(str(folder), revision=None)
    for name, tensor in loader._get_weights_iterator(source):
        expert, projection, kind = name.removeprefix(f"{PREFIX}.").split(".")
        shard = NAMES[projection]
        param = f"{SHARDS[shard]}_{kind}"
        experts.load_tensor(layer, param, tensor, shard, int(expert))
    experts.process(layer, TP, 3)


def test_a_whole_checkpoint_loads(layer, folder):
    load_folder(layer, folder)


@pytest.mark.parametrize("left", [0, 5, 1000, -1], ids=lambda left: f"[:{left}]")
@pytest.mark.parametrize("file", ["a.safetensors", "b.safetensors"])
def test_truncated_safetensors(layer, folder, file, left):
    """The library that reads it says so before a tensor is taken out of it."""
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:left])
    with pytest.raises(Exception, match="(?i)header|incomplete|too small"):
        load_folder(layer, folder)
    # And if somebody goes on: what came is not all of it.
    with pytest.raises(ValueError, match=f"{PREFIX}: .* is missing|no kernel"):
        experts.load_tensor(layer, "w2_weight_scale_inv", torch.ones(2, 12), "w2", 0)
        experts.process(layer, TP, 3)


@pytest.mark.parametrize(
    ("file", "missing"),
    [
        ("a.safetensors", r"w13_weight of expert 0 \(w1\) .* \(6 of 12 tensors are\)"),
        ("b.safetensors", r"w13_weight_scale_inv of expert 0 .* \(6 of 12 tensors are"),
    ],
)
def test_a_missing_shard(layer, folder, file, missing):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load_folder(layer, folder)
    # Without an index, as of a copy by hand.
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=f"{PREFIX}: {missing}"):
        load_folder(layer, folder)


def test_scales_that_are_all_nan(layer, folder):
    nan = {"w13": (12, 2), "w2": (2, 12)}
    load_folder(layer, folder)
    checkpoint = Checkpoint.random(TOTAL)
    experts.load(layer, checkpoint)
    for shard, stem in SHARDS.items():
        for expert in (0, 1):
            scale = torch.full(nan[stem], torch.nan)
            experts.load_tensor(layer, f"{stem}_weight_scale_inv", scale, shard, expert)
    with pytest.raises(ValueError, match=r"\(w1\) holds the scale nan for block \(4"):
        experts.process(layer, TP, 3)


def test_scales_of_a_linear_layer_that_are_all_nan():
    layer = row_parallel(TP, 3)
    weight, scale = matrix(HIDDEN, TOTAL, seed=0)
    load(layer, {None: (weight, torch.full_like(scale, torch.nan))})
    with (
        pytest.raises(ValueError, match=r"holds the scale nan for block \(0, 4\)"),
        rank_of(TP, 3),
    ):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_scales_of_another_dtype(layer, dtype):
    """Such as E8M0 exponents that were saved as bytes: 127 would be read for 1."""
    with pytest.raises(ValueError, match=f"w2.* has dtype {dtype}, but block scales"):
        experts.load_tensor(
            layer, "w2_weight_scale_inv", torch.ones(2, 12).to(dtype), "w2", 0
        )
    linear = row_parallel(TP, 3)
    weight, scale = matrix(HIDDEN, TOTAL, seed=0)
    with pytest.raises(ValueError, match=f"has dtype {dtype}, but block scales are"):
        load(linear, {None: (weight, scale.ceil().to(dtype))})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_in_16_bits_are_taken(layer, dtype):
    scale = Checkpoint.random(TOTAL).scales["w2"][0].to(dtype)
    experts.load_tensor(layer, "w2_weight_scale_inv", scale, "w2", 0)
    mine = 3 * 192 // BLOCK
    slot = layer.w2_weight_scale_inv.data[0]
    assert torch.equal(slot, scale[:, mine : mine + 2].float())


def test_blocks_that_are_larger_than_those_of_the_tensors():
    layer = experts.build(TOTAL, TP, 3, weight_block_size=(256, 256), hidden=512)
    with pytest.raises(ValueError) as caught:
        experts.load(layer, Checkpoint.random(TOTAL, hidden=512))
    assert "has shape (12, 4), but the model needs (6, 2), one" in str(caught.value)
    assert "weight_block_size in config.json" in str(caught.value)


def test_blocks_that_are_smaller_than_those_of_the_tensors():
    """192 columns are whole blocks of 64: a matter of stock vLLM. 80 are not."""
    layer = experts.build(TOTAL, TP, 3, weight_block_size=(64, 64))
    assert type(layer.quant_method).__module__.startswith("vllm.")
    layer = experts.build(640, TP, 3, weight_block_size=(64, 64))
    with pytest.raises(ValueError, match=r"\(5, 2\), but the model needs \(10, 4\)"):
        experts.load(layer, Checkpoint.random(640))


@pytest.mark.parametrize("tp_size", [48, 512, 1536])
def test_many_ranks_in_one_block(tp_size):
    """As far as one column a rank, in the last of them."""
    layer = row_parallel(tp_size, tp_size - 1)
    weight, scale = matrix(HIDDEN, TOTAL, seed=0)
    load(layer, {None: (weight, scale)})
    held = experts.dequantize(layer.weight.data, layer.weight_scale_inv.data)
    size = TOTAL // tp_size
    whole = experts.dequantize(weight, scale)
    assert torch.equal(held[:, -size:], whole[:, -size:])
    assert not held[:, :-size].any() and layer.weight.dtype == FP8


def row_parallel(tp_size: int, rank: int):
    sizes = {"input_size": TOTAL, "output_size": HIDDEN, "bias": False}
    return build("RowParallelLinear", tp_size, rank, **sizes)
