"""A GPU that is not there: kernels are interpreted, and times are made up."""

import json
from types import SimpleNamespace

import pytest

from tests.cli.check.known_models import QUANTIZATION

# 192 columns of 4 experts on each of two ranks.
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 384,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 256,
    "quantization_config": QUANTIZATION,
}


class NothingToCompile:
    """In the place of processes that compile: what is interpreted is not."""

    def __init__(self, arch):
        assert arch == 90

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        pass

    def compile(self, calls):
        assert calls
        return []


@pytest.fixture
def model(tmp_path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Forget tuned files, before and after; none is told of."""
    for change in (lambda name: monkeypatch.setenv(name, ""), monkeypatch.delenv):
        change("VLLM_TUNED_CONFIG_FOLDER")
    from vllm_patch.fp8_tp_padding.kernels import tuned_tiles

    tuned_tiles.tuned_tiles.cache_clear()
    yield
    tuned_tiles.tuned_tiles.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Return what says how many microseconds tiles take, as ``clock``; 100 at first."""
    import torch

    from vllm_patch.cli.tune import ahead, candidates, command, graph_timing

    hopper = candidates.Gpu(132, 232448, True, True)
    found = SimpleNamespace(clock=lambda tiles: 100.0)

    def capture(calls):
        return calls[0].func.__self__.tiles, len(calls)

    def microseconds(graphs, replays):
        return [found.clock(tiles) * calls for tiles, calls in graphs]

    monkeypatch.setattr(graph_timing, "capture", capture)
    monkeypatch.setattr(graph_timing, "microseconds", microseconds)
    monkeypatch.setattr(ahead, "Compilers", NothingToCompile)
    monkeypatch.setattr(command, "_arch", lambda: 90)
    monkeypatch.setattr(command, "_device", lambda: (torch.device("cpu"), hopper))
    return found
