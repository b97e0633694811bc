# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where kernels of linear layers start while the ones before them end."""

from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels import (
    columns,
    dependent_launch,
    input_quant,
)

from .tensor_parallel import runs_kernels
from .test_linear_loading import HIDDEN, build, load, matrix, run

pytestmark = runs_kernels


@pytest.fixture(params=[(True, True), (True, False), (False, True)])
def supported(request, monkeypatch):
    """Whether the platform is CUDA, and its GPU can; return whether both."""
    is_cuda, can = request.param
    platform = SimpleNamespace(is_cuda=lambda: is_cuda, is_arch_support_pdl=lambda: can)
    monkeypatch.setattr(dependent_launch, "current_platform", platform)
    dependent_launch.launches_dependently.cache_clear()
    yield is_cuda and can
    dependent_launch.launches_dependently.cache_clear()


class Recorded:
    """A kernel that notes with which options it is launched."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append(options)
            return self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize("tokens", [1, 17])
def test_where_the_gpu_can(monkeypatch, supported, tokens):
    """Quantization and gathering, of one program and of several."""
    sizes = {"input_size": HIDDEN, "output_size": 640, "bias": False}
    layer = build("ColumnParallelLinear", 8, 1, **sizes)
    load(layer, {None: matrix(640, HIDDEN, seed=0)})
    x = torch.ones(tokens, HIDDEN)
    run(layer, x, 8, 1)  # Turns the weights into what the kernels take.
    launches = []
    for module, name in (
        (input_quant, "_padded_quant_kernel"),
        (columns, "_copy_kernel"),
    ):
        kernel = Recorded(getattr(module, name), launches)
        monkeypatch.setattr(module, name, kernel)
    layer.quant_method.apply(layer, x)
    assert len(launches) == 2
    for options in launches:
        assert options["USE_PDL"] == supported
        assert options.get("launch_pdl", False) == supported
