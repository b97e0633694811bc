"""The installed vLLM's engine as benchmarks build it: as one rank of TP 8, and real."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import engine_rows, plot_moe
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
    """Experts of 1536 columns, 192 of eight ranks."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(ModelConfig.read(QWEN3_MOE).with_layers(1), directory)
    return directory


@pytest.fixture
def rows(checkpoint, tmp_path):
    """Return a function that measures ranks side by side: results, and logits."""

    def measure(measures: dict[int, dict]):
        processes, files = [], []
        for rank, each in measures.items():
            given, found, logits = (
                tmp_path / f"{rank}.{n}" for n in ("in", "out", "pt")
            )
            spec = {
                **{"tp_size": 8, "rank": rank, "logits": str(logits), **each},
                "engine": {"model": str(checkpoint), **ENGINE},
            }
            given.write_text(json.dumps(spec))
            command = [sys.executable, "-m", "benchmarks.engine_row", given, found]
            environment = {**os.environ, **ENVIRONMENT}
            processes.append(subprocess.Popen(command, env=environment))
            files.append((found, logits))
        assert not any([process.wait() for process in processes])
        return [
            ([json.loads(line) for line in f.read_text().splitlines()], torch.load(pt))
            for f, pt in files
        ]

    return measure


def test_it_loads_and_measures_the_ranks_part(rows):
    measures = {1: {"prefill": [16], "decode": {"32": [1, 4]}}, 2: {}}
    (found, logits), (_, others) = rows(measures)
    assert found[0]["experts"].endswith(" 256"), "192 columns in whole blocks"
    measured = {(r["measure"], r.get("tokens")) for r in found}
    assert {("prefill_ms", 16), ("decode_ms", 1), ("decode_ms", 4)} <= measured
    assert all(r["value"] > 0 for r in found)
    assert torch.isfinite(logits).all()
    assert (logits.norm(dim=-1) > 0).all(), "each prompt is computed"
    assert not torch.allclose(logits, others), "another rank's part is another"


def test_ranks_that_talk_serve(tmp_path):
    """The command for a host's GPUs, with two ranks on a CPU."""
    file = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "benchmarks.engine", "--gpus", "2", "--small"]
    command += ["--no-check", "--ways", "this", "--modes", "served", "--csv", file]
    subprocess.run(command, check=True)
    found = plot_moe.read(file)
    assert {(r["tp_size"], r["ranks"]) for r in found} == {("2", "2")}
    values = {engine_rows.place(row): float(row["value"]) for row in found}
    assert min(values.values()) > 0
    measures = "output_tokens_s", "ttft_ms", "tpot_ms"
    assert {(name, "4", "16") for name in measures} <= {*values}
