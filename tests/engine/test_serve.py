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

from vllm_patch.cli import cpu_fp8, engine_process
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint

# A CPU for which vLLM has no FP8 operators.
AVX2_ONLY = Path(__file__).parent / "avx2_only"
QWEN3_MOE = Path(__file__).parent.parent / "models" / "qwen3_moe_1536.json"
START_SECONDS = 600


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Qwen3-MoE model with experts of 384 columns: 192 at TP 2."""
    config = ModelConfig.read(QWEN3_MOE).with_layers(1).with_expert_size(384)
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(config, directory)
    return directory


@contextlib.contextmanager
def serve(checkpoint, log: Path, *arguments: str, **env):
    """Run ``vllm serve`` at TP 2; yield the process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(checkpoint)]
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


def complete(address: str, model: str) -> dict:
    body = {"model": model, "prompt": "t17 t4 t99", "max_tokens": 4, "logprobs": 1}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


@pytest.mark.parametrize(
    ("path", "arguments"),
    # Plain torch is not for torch.compile.
    [("", []), (str(AVX2_ONLY), ["--enforce-eager"])],
    ids=["this CPU", "AVX2 only"],
)
def test_installed_package_serves_a_cut_size(
    checkpoint, tmp_path, monkeypatch, path, arguments
):
    monkeypatch.setenv("PYTHONPATH", path, prepend=os.pathsep)
    log, env = tmp_path / "log", cpu_fp8.environment()
    with serve(checkpoint, log, *arguments, **env) as (server, address):
        assert wait_until_up(server, address), log.read_text()[-3000:]
        answer = complete(address, str(checkpoint))
    (choice,) = answer["choices"]
    assert answer["usage"]["completion_tokens"] == 4
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])
    lines = [line for line in log.read_text().splitlines() if "FP8 layers cut" in line]
    assert len(lines) == 1
    assert "1 MoE layers, 384 / TP 2 = 192 padded to 256" in lines[0]


@pytest.mark.parametrize(
    "env", [{"VLLM_PLUGINS": ""}, {"VLLM_FP8_TP_PADDING": "off"}], ids=str
)
def test_without_the_plugin_it_fails_as_stock_does(checkpoint, tmp_path, env):
    log = tmp_path / "log"
    with serve(checkpoint, log, **cpu_fp8.environment(), **env) as (server, address):
        assert not wait_until_up(server, address)
        assert server.returncode != 0
    text = log.read_text()
    assert "ValueError: Unsupported FP8 MoE backend: NONE" in text
    assert "Unknown vLLM environment variable" not in text
