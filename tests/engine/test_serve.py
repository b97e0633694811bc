"""The front door: ``vllm serve`` of the installed vLLM, over HTTP, at a cut size."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from vllm_patch.cli import comparison, engine_process
from vllm_patch.cli.comparison import Difference
from vllm_patch.cli.cpu_fp8 import operators
from vllm_patch.cli.engine_process import EngineProcess

# A CPU for which vLLM has no FP8 operators.
AVX2_ONLY = Path(__file__).parent / "avx2_only"
QWEN3_MOE = Path(__file__).parent.parent / "models" / "qwen3_moe_1536.json"
START_SECONDS = 600
# How far stock at another TP is from stock TP 1 in `make demo`; a wrong lead is 0.13.
CONTROL = Difference(mean=0.0061, max=0.268, top1=0.986, positions=928)


def answered(checkpoint, prompts, logs: Path) -> dict:
    """Return what stock answers at TP 1, offline."""
    engine = {"model": str(checkpoint), "max_model_len": 128}
    each = [[prompt] for prompt in prompts]
    process = EngineProcess("stock TP 1", engine)
    result = engine_process.run(process, each, logs, START_SECONDS)
    assert result.scores, result.error
    return result.scores


@contextlib.contextmanager
def serve(checkpoint, log: Path, *arguments: str, **env):
    """Run ``vllm serve`` at TP 2, for any CPU; yield the process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "benchmarks.vllm_on_any_cpu",
        "serve",
        str(checkpoint),
    ]
    command += ["--tensor-parallel-size", "2", "--port", str(port)]
    command += ["--kv-cache-memory-bytes", "256M", *arguments]
    with log.open("w") as sink:
        server = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**engine_process.ENVIRONMENT, **os.environ, **env},
            start_new_session=True,
        )
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_up(server, address: str) -> bool:
    """Return True once the server is healthy, False if it ended."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            return False
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return True
        time.sleep(1)
    raise TimeoutError(f"neither up nor down after {START_SECONDS} s")


def complete(address: str, model: str, prompt: str | list[int]) -> dict:
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "logprobs": 1}
    body["prompt_logprobs"] = 1
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def scores(answers: list[dict], prompts: list[list[int]]) -> dict:
    """Return what ``engine_run`` would."""
    logprobs, top_tokens = [], []
    for answer, prompt in zip(answers, prompts, strict=True):
        (choice,) = answer["choices"]
        pairs = zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
        for token, ranked in pairs:
            logprobs.append(ranked[str(token)]["logprob"])
            top = max(ranked, key=lambda each: ranked[each]["logprob"])
            top_tokens.append(int(top))
    return {"logprobs": logprobs, "top_tokens": top_tokens}


@pytest.mark.parametrize("path", ["", str(AVX2_ONLY)], ids=["this CPU", "AVX2 only"])
def test_installed_package_serves_a_cut_size(
    checkpoint, prompts, request, tmp_path, monkeypatch, path
):
    monkeypatch.setenv("PYTHONPATH", path, prepend=os.pathsep)
    # Inductor's key has the CPU's name, and not what it is told that it has.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    if path:  # Plain torch rounds elsewhere than vLLM's operators.
        expected = answered(checkpoint, prompts, tmp_path)
    else:
        expected = request.getfixturevalue("expected")
    log, model = tmp_path / "log", str(checkpoint)
    # Plain torch is not for torch.compile.
    is_plain = path or operators.choose() == operators.PLAIN_TORCH
    arguments = ["--enforce-eager"] if is_plain else []
    with serve(checkpoint, log, *arguments) as (server, address):
        assert wait_until_up(server, address), log.read_text()[-3000:]
        answer = complete(address, model, "t17 t4 t99")
        answers = [complete(address, model, prompt) for prompt in prompts]
    (choice,) = answer["choices"]
    assert answer["usage"]["completion_tokens"] == 4
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])
    gap = comparison.difference(expected, scores(answers, prompts))
    assert gap.within(comparison.limits(CONTROL)), gap
    lines = [line for line in log.read_text().splitlines() if "FP8 layers cut" in line]
    assert len(lines) == 1
    assert "2 MoE layers, 384 / TP 2 = 192 padded to 256" in lines[0]


def test_where_it_is_off_it_fails_as_stock_does(checkpoint, tmp_path):
    """And says why it let that happen."""
    log = tmp_path / "log"
    with serve(checkpoint, log, VLLM_FP8_TP_PADDING="off") as (server, address):
        assert not wait_until_up(server, address)
        assert server.returncode != 0
    text = log.read_text()
    assert "ValueError: Unsupported FP8 MoE backend: NONE" in text
    assert "Unknown vLLM environment variable" not in text
    assert "mlp.experts to stock vLLM: VLLM_FP8_TP_PADDING=off. Unset it." in text
