# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Padded linear layers on Humming, which takes its sizes from the layer, too."""

import sys
import types

import pytest
import torch

from .exact import activations, matrix
from .experts import dequantize
from .tensor_parallel import rank_of, runs_kernels
from .test_linear_loading import HIDDEN, build, load
from .test_marlin import MINE, RANK, SIZES, TP, sizes_of

pytestmark = [runs_kernels, pytest.mark.usefixtures("humming")]


@pytest.fixture
def humming(monkeypatch):
    """Choose Humming, and let torch multiply by what it was given."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm import humming
    from vllm.platforms import current_platform

    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS[current_platform._enum]
    others = [kernel.__name__ for kernel in kernels if "Humming" not in kernel.__name__]
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", ",".join(others))

    def patch(name, function):
        # No release has all of them.
        monkeypatch.setattr(humming, name, function, raising=False)

    def prepare(layer, quant_config):
        block = quant_config["weight_scale_group_size"]
        outputs, columns = layer.output_partition_sizes, layer.input_size_per_partition
        assert (sum(outputs), columns) == tuple(layer.weight.shape)
        assert layer.output_size_per_partition == sum(outputs)
        assert layer.weight_scale.shape == (
            sum(-(-rows // block) for rows in outputs),
            columns // block,
        )
        assert layer.has_bias == (layer.bias is not None)
        layer.prepared = dequantize(layer.weight, layer.weight_scale), layer.has_bias
        layer.compute_config = None  # Of 0.26.

    def multiply(layer, inputs, skip_bias_add=False, **_):
        weight, has_bias = layer.prepared
        bias = layer.bias if has_bias and not skip_bias_add else None
        return torch.nn.functional.linear(inputs, weight, bias)

    def standardize(layer, name_map):
        layer.weight_scale = getattr(layer, name_map["weight_scale"])

    patch("has_humming", lambda: True)
    patch("convert_linear_layer_to_humming_standard", standardize)
    patch("create_humming_locks", lambda device: None)
    for name in ("prepare_humming_layer", "prepare_humming_linear_layer_config"):
        patch(name, prepare)
    patch("apply_humming_linear", multiply)
    facade = types.SimpleNamespace(
        dtypes=types.SimpleNamespace(
            DataType=types.SimpleNamespace(from_torch_dtype=lambda dtype: dtype)
        ),
        HummingMethod=types.SimpleNamespace(
            forward_layer=lambda layer, inputs, **_: multiply(layer, inputs)
        ),
    )
    monkeypatch.setitem(sys.modules, "vllm.utils.humming", facade)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_sees_the_sizes_of_the_weights_it_gets(kind, has_bias):
    layer = build(kind, TP, RANK, torch.float32, bias=has_bias, **SIZES[kind])
    kernel = layer.quant_method.chosen_kernel(layer)
    assert type(kernel).__name__ == "HummingFP8ScaledMMLinearKernel"
    weight, scale = matrix(*reversed([*SIZES[kind].values()]), seed=0)
    load(layer, {None: (weight, scale)})
    if has_bias:
        layer.bias.weight_loader(layer.bias, torch.arange(float(len(weight))))
    before = sizes_of(layer), layer.output_partition_sizes, layer.has_bias
    with rank_of(TP, RANK, torch.float32):
        layer.quant_method.process_weights_after_loading(layer)
    assert before == (sizes_of(layer), layer.output_partition_sizes, has_bias)
    x, whole = activations(3, weight.shape[1]), dequantize(weight, scale)
    if kind == "RowParallelLinear":
        x, whole = x[:, MINE], whole[:, MINE]
    else:
        whole = whole[MINE]
    assert sizes_of(layer) == tuple(whole.shape)
    bias = layer.bias if has_bias else None
    y = layer.quant_method.apply(layer, x, bias)
    assert torch.equal(y, torch.nn.functional.linear(x, whole, bias))


def test_merged_layers():
    """Unequal shards, of which one is aligned."""
    totals = [640, 1024]
    sizes = {"input_size": HIDDEN, "output_sizes": totals, "bias": False}
    layer = build("MergedColumnParallelLinear", TP, RANK, torch.float32, **sizes)
    tensors = {i: matrix(size, HIDDEN, seed=i) for i, size in enumerate(totals)}
    load(layer, tensors)
    with rank_of(TP, RANK, torch.float32):
        layer.quant_method.process_weights_after_loading(layer)
    x = activations(3, HIDDEN)
    mine = [
        dequantize(*tensors[i])[RANK * size // TP : (RANK + 1) * size // TP]
        for i, size in enumerate(totals)
    ]
    assert layer.output_partition_sizes == [80, 128]
    assert torch.equal(layer.quant_method.apply(layer, x), x @ torch.cat(mine).T)
