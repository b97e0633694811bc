"""Experts that are cut inside a quant block in engines that take LoRA adapters."""

import contextlib
import importlib

import pytest

from tests.fp8_tp_padding import experts
from tests.fp8_tp_padding.experts import Checkpoint, build
from vllm_patch import patch_table
from vllm_patch.patch_table import PATCHES

TP = 8
ROWS = [row for row in PATCHES if row.module == "vllm.lora.layers.fused_moe"]


def test_they_are_padded_for_kernels_that_take_adapters(plugin, padding_log):
    layer = build(1536, TP, 3, lora=True)
    assert layer.quant_method.experts_cls.__name__ == "TritonExperts"
    assert layer.w13_weight.shape[1] == 2 * 256
    experts.load(layer, Checkpoint.random(1536))
    layer = build(1536, TP, 0, lora=True)
    experts.load(layer, Checkpoint.random(1536))
    experts.process(layer, TP, 0)
    (line,) = padding_log()
    reason = "192 padded to 256 (masked kernels take no LoRA adapters)"
    assert reason in line.getMessage()


@pytest.mark.parametrize(
    ("row", "total"),
    [*zip(ROWS, (1536, 640, 1408), strict=True)],
    ids=[row.name for row in ROWS],
)
def test_without_one_of_the_rows_they_stay_stock(plugin, padding_log, row, total):
    """Which refuses them, in some releases and sizes."""
    importlib.import_module(row.module)
    patch_table.revert(row)
    with contextlib.suppress(ValueError):
        layer = build(total, TP, 0, lora=True)
        assert not type(layer.quant_method).__module__.startswith("vllm_patch.")
    assert any("LoRA adapters do not know" in r.getMessage() for r in padding_log())
