"""The installed vLLM's engine, alone as one rank of TP 8, as benchmarks build it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint

from .test_serve import QWEN3_MOE

ENGINE = {
    "skip_tokenizer_init": True,
    "max_model_len": 2100,
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 << 20,
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(ModelConfig.read(QWEN3_MOE).with_layers(1), directory)
    return directory


@pytest.fixture
def row(checkpoint, tmp_path):
    """Return a function that measures a rank: its result, and its logits."""

    def measure(rank: int, **measures):
        given, found, logits = (tmp_path / f"{rank}.{n}" for n in ("in", "out", "pt"))
        spec = {
            **{"tp_size": 8, "rank": rank, "logits": str(logits), **measures},
            "engine": {"model": str(checkpoint), **ENGINE},
        }
        given.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "tests.engine.one_rank", given, found]
        subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True)
        return json.loads(found.read_text()), torch.load(logits)

    return measure


def test_it_loads_and_measures_the_ranks_part(row):
    result, logits = row(1, prefill=[16], decode={"32": [1, 4]})
    assert result["experts"].endswith(" 256"), "192 columns in whole blocks"
    measured = {(r["measure"], r.get("tokens")) for r in result["rows"]}
    assert {("prefill_ms", 16), ("decode_ms", 1), ("decode_ms", 4)} <= measured
    assert all(r["value"] > 0 for r in result["rows"])
    assert torch.isfinite(logits).all()
    assert (logits.norm(dim=-1) > 0).all(), "each prompt is computed"
    _, others = row(2)
    assert not torch.allclose(logits, others), "another rank's part is another"
