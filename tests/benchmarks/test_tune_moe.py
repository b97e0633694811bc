"""The search for tiles, with other clocks than a GPU's."""

import argparse
import itertools
import json
from dataclasses import asdict

from benchmarks import tune_moe
from vllm_patch.fp8_tp_padding.kernels.tiles import SortedTiles
from vllm_patch.fp8_tp_padding.kernels.tuned_tiles import read_config

SIZES = argparse.Namespace(experts=4, top_k=2, hidden=128, total=384, tp=2, rank=1)


def test_each_step_takes_what_was_fastest(plugin, monkeypatch, tmp_path):
    """Here the last one tried, and it runs; a file of it can be read back."""
    monkeypatch.setattr(tune_moe, "ROUTINGS", 1)
    monkeypatch.setattr(tune_moe, "capture", lambda calls: [call() for call in calls])
    clock = itertools.count(1000, -1)
    monkeypatch.setattr(tune_moe, "microseconds", lambda graphs: [next(clock)])
    tiles, _ = tune_moe.tune(tune_moe.Layer(SIZES), 1)
    assert tiles == SortedTiles(
        *(16, tune_moe.gate_up_tiles(tiles)[-1], tune_moe.down_tiles(tiles)[-1]),
        *(8, True),
    )
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({1: asdict(tiles)}))
    assert read_config(file) == {1: tiles}
