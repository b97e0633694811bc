"""compressed-tensors on GPUs without FP8, where vLLM multiplies in 16 bits.

By Humming or Marlin, whichever a release prefers there.
"""

import pytest
import torch

from tests.fp8_tp_padding import test_humming, test_marlin
from tests.fp8_tp_padding.exact import activations, matrix
from tests.fp8_tp_padding.experts import dequantize
from tests.fp8_tp_padding.tensor_parallel import rank_of
from tests.fp8_tp_padding.test_linear_loading import build
from tests.fp8_tp_padding.test_marlin import MINE, RANK, SIZES, TP, sizes_of

from .configs import FORMATS

CT = FORMATS["compressed-tensors"]
humming = test_humming.humming
marlin = test_marlin.marlin


@pytest.fixture(params=["humming", "marlin"])
def w8a16(monkeypatch, plugin, request):
    """Let vLLM take the scheme of such GPUs; return the name of its kernel."""
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors,
    )

    monkeypatch.setattr(
        compressed_tensors.CompressedTensorsConfig,
        "_check_scheme_supported",
        staticmethod(lambda capability, *_, **__: capability < 89),
    )
    request.getfixturevalue(request.param)
    return request.param


@pytest.mark.parametrize("kind", SIZES)
def test_its_linear_layers(w8a16, kind):
    make = CT.quant_config
    sizes = {**SIZES[kind], "bias": False}
    layer = build(kind, TP, RANK, torch.float32, quant_config=make, **sizes)
    assert type(layer.scheme).__name__ == "CompressedTensorsW8A16Fp8"
    assert type(layer.quant_method).__name__ == CT.cut_linear
    kernel = layer.quant_method.chosen_kernel(layer)
    assert w8a16 in type(kernel).__name__.lower()
    weight, scale = matrix(*reversed([*SIZES[kind].values()]), seed=0)
    layer.weight.weight_loader(layer.weight, weight)
    layer.weight_scale.weight_loader(layer.weight_scale, scale)
    with rank_of(TP, RANK, torch.float32):
        layer.quant_method.process_weights_after_loading(layer)
    x, whole = activations(3, len(weight[0])), dequantize(weight, scale)
    if kind == "RowParallelLinear":
        x, whole = x[:, MINE], whole[:, MINE]
    else:
        whole = whole[MINE]
    assert sizes_of(layer) == tuple(whole.shape)
    assert torch.equal(layer.quant_method.apply(layer, x), x @ whole.T)
