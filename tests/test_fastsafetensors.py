"""Cut layers from vLLM's fastsafetensors iterator: tensors in memory that is reused."""

import pytest
import torch
from safetensors.torch import save_file

from tests.fp8_tp_padding import experts
from tests.fp8_tp_padding.exact import matrix
from tests.fp8_tp_padding.experts import Checkpoint, poison
from tests.fp8_tp_padding.test_linear_loading import HIDDEN
from tests.fp8_tp_padding.test_linear_loading import build as build_linear

pytest.importorskip("fastsafetensors")

# 80 columns a rank, of five blocks.
TOTAL, TP, RANK = 640, 8, 3
NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.fixture
def iterated(monkeypatch, plugin, tmp_path):
    """Return what iterates over tensors, two files of them, as vLLM does on a GPU."""
    from fastsafetensors import parallel_loader

    from vllm.model_executor.model_loader import weight_utils

    stock = parallel_loader.ParallelLoader

    def on_cpu(**arguments):
        return stock(**{**arguments, "device": "cpu", "nogds": True})

    monkeypatch.setattr(parallel_loader, "ParallelLoader", on_cpu)
    platform = type(weight_utils.current_platform)
    monkeypatch.setattr(platform, "current_device", lambda *_: 0, raising=False)

    def iterate(tensors):
        half = len(tensors) // 2
        files = [str(tmp_path / name) for name in "ab"]
        for file, names in zip(
            files, ([*tensors][:half], [*tensors][half:]), strict=True
        ):
            save_file({name: tensors[name] for name in names}, file)
        for name, tensor in weight_utils.fastsafetensors_weights_iterator(files, False):
            yield name, tensor
            # The next file's, for all that a layer knows.
            tensor.view(torch.uint8).fill_(0x7F)

    return iterate


def same(layer, expected) -> bool:
    ours, theirs = (dict(each.named_parameters()) for each in (layer, expected))
    assert ours.keys() == theirs.keys()
    return all(
        torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8))
        for name in ours
    )


@pytest.mark.parametrize("store", ["auto", "padded"])
def test_experts(iterated, monkeypatch, store):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", store)
    checkpoint = Checkpoint.random(TOTAL)
    layer, expected = (experts.build(TOTAL, TP, RANK) for _ in range(2))
    experts.load(expected, checkpoint)
    poison(layer)
    tensors = {
        f"{expert}.{name}.{suffix}": of_shard[shard][expert].clone()
        for suffix, of_shard in (
            ("weight", checkpoint.weights),
            ("weight_scale_inv", checkpoint.scales),
        )
        for shard, name in NAMES.items()
        for expert in range(len(of_shard[shard]))
    }
    assert len(set(layer.load_weights(iterated(tensors)))) == 4
    assert same(layer, expected)
    experts.process(layer, TP, RANK)


def test_a_row_parallel_layer(iterated):
    sizes = {"input_size": TOTAL, "output_size": HIDDEN, "bias": False}
    layer, expected = (
        build_linear("RowParallelLinear", TP, RANK, torch.float32, **sizes)
        for _ in range(2)
    )
    weight, scale = matrix(HIDDEN, TOTAL, seed=0)
    tensors = {"weight": weight, "weight_scale_inv": scale}
    poison(layer)
    for name, tensor in tensors.items():
        param = getattr(expected, name)
        param.weight_loader(param, tensor)
    for name, tensor in iterated(tensors):
        param = getattr(layer, name)
        param.weight_loader(param, tensor)
    assert same(layer, expected)


def test_stock_has_no_such_experts(iterated, monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "off")
    with pytest.raises(ValueError, match="divisible|NONE|refine"):
        experts.build(TOTAL, TP, RANK)
