# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sleep drops or offloads the memory that loading took; parameters come back.

At level 2 a reload fills them again, which test_moe_loading.py and
test_linear_loading.py do over dirty ones. Nothing else may hold memory from then.
"""

import pytest
import torch

from .experts import Checkpoint, build, load
from .tensor_parallel import rank_of
from .test_linear_loading import HIDDEN, matrix, merged
from .test_linear_loading import load as load_linear


def tensors_in(value, seen: set[int]):
    """Yield the tensors that an object holds, or what it holds does."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each, seen)
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from tensors_in(each, seen)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value), seen)


@pytest.fixture(params=["compact", "padded", "linear"])
def layer(request, monkeypatch):
    if request.param == "linear":
        layer = merged(8, 1, [640, 1024])
        tensors = {i: matrix(n, HIDDEN, i) for i, n in enumerate((640, 1024))}
        load_linear(layer, tensors)
    else:
        mode = {"compact": "auto"}.get(request.param, request.param)
        monkeypatch.setenv("VLLM_FP8_TP_PADDING", mode)
        layer = build(1536, 8, 1)
        load(layer, Checkpoint.random(1536))
    with rank_of(8, 1):
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def test_methods_hold_no_memory_beside_the_parameters(layer):
    mine = {param.untyped_storage().data_ptr() for param in layer.parameters()}
    held = tensors_in(layer.quant_method, seen=set())
    assert all(tensor.untyped_storage().data_ptr() in mine for tensor in held)
