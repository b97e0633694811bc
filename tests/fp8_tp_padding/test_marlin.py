# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Padded linear layers on Marlin, which takes its sizes from the layer."""

import pytest
import torch

from .exact import activations, matrix
from .experts import dequantize
from .tensor_parallel import rank_of, runs_kernels
from .test_linear_loading import HIDDEN, build, load

pytestmark = runs_kernels

TP, RANK = 8, 1
SIZES = {
    "ColumnParallelLinear": {"input_size": HIDDEN, "output_size": 640},
    "RowParallelLinear": {"input_size": 640, "output_size": HIDDEN},
}
MINE = slice(80, 160)


@pytest.fixture
def marlin(monkeypatch):
    """Choose Marlin, and let torch multiply; return the sizes it was called with."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm import marlin
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp8
    from vllm.platforms import current_platform

    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS[current_platform._enum]
    others = [kernel.__name__ for kernel in kernels if "Marlin" not in kernel.__name__]
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", ",".join(others))
    # 0.26 to 0.28 ask for this on GPUs that compute in FP8.
    monkeypatch.setenv("VLLM_TEST_FORCE_FP8_MARLIN", "1")
    monkeypatch.setattr(
        marlin_utils_fp8.ops, "gptq_marlin_repack", lambda b_q_weight, **_: b_q_weight
    )
    # It knows none for float32.
    bias_of_exponents = "fp8_fused_exponent_bias_into_scales"
    monkeypatch.setattr(marlin_utils_fp8, bias_of_exponents, lambda scales: scales)
    prepared, sizes = [], []
    stock = marlin.prepare_fp8_layer_for_marlin

    def prepare(layer, *args, **kwargs):
        sizes.append(sizes_of(layer))
        prepared.append(dequantize(layer.weight, layer.weight_scale_inv))
        stock(layer, *args, **kwargs)

    def multiply(input, weight, weight_scale, workspace, size_n, size_k, bias, **_):
        sizes.append((size_n, size_k))
        assert (size_n, size_k) == prepared[0].shape
        return torch.nn.functional.linear(input, prepared[0], bias)

    monkeypatch.setattr(marlin, "prepare_fp8_layer_for_marlin", prepare)
    monkeypatch.setattr(marlin, "apply_fp8_marlin_linear", multiply)
    return sizes


def built(kind):
    layer = build(kind, TP, RANK, torch.float32, **SIZES[kind])
    assert layer.quant_method.use_marlin
    weight, scale = matrix(*reversed([*SIZES[kind].values()]), seed=0)
    load(layer, {None: (weight, scale)})
    layer.bias.weight_loader(layer.bias, torch.arange(float(len(weight))))
    with rank_of(TP, RANK, torch.float32):
        layer.quant_method.process_weights_after_loading(layer)
    return layer, dequantize(weight, scale)


def sizes_of(layer) -> tuple[int, int]:
    return layer.output_size_per_partition, layer.input_size_per_partition


def test_columns(marlin):
    """It wants a bias as wide as the padded output, to permute it."""
    layer, weight = built("ColumnParallelLinear")
    assert layer.bias.tolist() == list(range(80, 160))
    assert layer.logical_widths == [80] and sizes_of(layer) == (80, HIDDEN)
    x = activations(3, HIDDEN)
    y = layer.quant_method.apply(layer, x, layer.bias)
    assert torch.equal(y, x @ weight[MINE].T + layer.bias)
    assert marlin == [(256, HIDDEN)] * 2


def test_rows(marlin):
    layer, weight = built("RowParallelLinear")
    assert sizes_of(layer) == (HIDDEN, 80)
    x = activations(3, 640)[:, MINE]
    # Marlin permuted the layer's own bias.
    bias = torch.arange(float(HIDDEN))
    y = layer.quant_method.apply(layer, x, bias)
    assert torch.equal(y, x @ weight[:, MINE].T + bias)
    assert marlin == [(HIDDEN, 256)] * 2


@pytest.mark.parametrize("kind", SIZES)
def test_torch_compile_traces_them(marlin, kind):
    layer, _ = built(kind)
    x = activations(3, sizes_of(layer)[1])
    eager = layer.quant_method.apply(layer, x, layer.bias)
    torch._dynamo.reset()
    traced = torch.compile(layer.quant_method.apply, backend="eager", fullgraph=True)
    assert torch.equal(traced(layer, x, layer.bias), eager)


@pytest.mark.parametrize("kind", SIZES)
def test_lora_layers_read_the_real_sizes(marlin, kind):
    from .test_linear_lora import RANK as LORA_RANK
    from .test_linear_lora import integers, set_lora, with_lora

    layer, weight = built(kind)
    lora = with_lora(layer, 1, RANK)
    rows, columns = weight.shape
    a, b = integers(LORA_RANK, columns, seed=1), integers(rows, LORA_RANK, seed=2) / 64
    set_lora(lora, [(a, b)])
    x = activations(3, sizes_of(layer)[1])
    if kind == "RowParallelLinear":
        a = a[:, MINE]
    else:
        b = b[MINE]
    plain = layer.quant_method.apply(layer, x, None)
    added = (x @ a.T) @ b.T
    with rank_of(TP, RANK, torch.float32):
        assert torch.equal(lora.apply(x, None), plain + added)
