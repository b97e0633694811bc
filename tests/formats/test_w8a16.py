"""compressed-tensors on GPUs without FP8, where vLLM multiplies in 16 bits."""

import pytest
import torch

from tests.fp8_tp_padding.experts import dequantize
from tests.fp8_tp_padding.test_linear_loading import HIDDEN, build, matrix

from .configs import FORMATS

TP = 8
CT = FORMATS["compressed-tensors"]


@pytest.fixture
def w8a16(monkeypatch, plugin):
    """Let vLLM take the scheme of such GPUs; its kernel is not run."""
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a16_fp8 as scheme,
    )

    config = compressed_tensors.CompressedTensorsConfig
    monkeypatch.setattr(
        config,
        "_check_scheme_supported",
        staticmethod(lambda capability, *_, **__: capability < 89),
    )
    kernel = torch.nn.Module()
    monkeypatch.setattr(scheme, "init_wfp8_a16_linear_kernel", lambda **_: kernel)
    return kernel


def test_its_linear_layers_rebuild(w8a16):
    weight, scale = matrix(HIDDEN, 640, seed=0)
    whole, parts = dequantize(weight, scale), []
    for rank in range(TP):
        sizes = {"input_size": 640, "output_size": HIDDEN, "bias": False}
        make = CT.quant_config
        layer = build("RowParallelLinear", TP, rank, quant_config=make, **sizes)
        assert type(layer.scheme).__name__ == "CompressedTensorsW8A16Fp8"
        assert type(layer.quant_method).__name__ == CT.cut_linear
        assert layer.quant_method.chosen_kernel(layer) is w8a16
        layer.weight.weight_loader(layer.weight, weight)
        layer.weight_scale.weight_loader(layer.weight_scale, scale)
        lead = rank * 80 % 128
        mine = dequantize(layer.weight.data, layer.weight_scale.data)
        parts.append(mine[:, lead : lead + 80])
    assert torch.equal(torch.cat(parts, 1), whole)
