"""A hub id: only config.json and headers are fetched, from a hub on this machine."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from vllm_patch.cli import UsageError
from vllm_patch.cli.check import checkpoint

from . import files
from .known_models import config

REPO = "Qwen/Small-FP8"
ASK = """
import sys
from vllm_patch.cli.main import main
sys.exit(main(["check", *sys.argv[1:]]))
"""


@pytest.fixture
def hub(tmp_path):
    """Serve a checkpoint as the hub does; yield its address and what it sent."""
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 2, "num_experts": 4}
    folder = files.write(tmp_path / "model", fields, shards=2)
    sent: list[tuple[str, int]] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET(with_body=False)

        def do_GET(self, with_body=True):
            file = folder / self.path.rpartition("/")[2].partition("?")[0]
            if f"/{REPO}/resolve/" not in self.path or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
                return
            first, last = 0, file.stat().st_size - 1
            if asked := self.headers.get("Range"):
                first, last = (int(n) for n in asked.partition("=")[2].split("-"))
                last = min(last, file.stat().st_size - 1)
            with file.open("rb") as opened:
                opened.seek(first)
                body = opened.read(last - first + 1) if with_body else b""
            sent.append((file.name, len(body)))
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(last - first + 1))
            self.send_header("ETag", f'"{file.name}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    server.server_close()


def ask(tmp_path, *arguments: str, **env):
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        **env,
    }
    return subprocess.run(
        [sys.executable, "-c", ASK, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_only_headers_are_fetched(tmp_path, hub):
    address, sent = hub
    options = "-tp", "4", "--vllm-version", "0.28.0"
    done = ask(tmp_path, REPO, *options, "--json", HF_ENDPOINT=address)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert (found["source"], found["model"]) == ("headers", REPO)
    local = ask(tmp_path, str(tmp_path / "model"), *options, "--json")
    assert json.loads(local.stdout)["sizes"] == found["sizes"]
    bytes_of = {}
    for name, size in sent:
        bytes_of[name] = bytes_of.get(name, 0) + size
    weights = [size for name, size in bytes_of.items() if name.endswith(".safetensors")]
    assert len(weights) == 2 and max(weights) <= 200_000 < 10**6


def test_a_hub_that_has_no_such_model(tmp_path, hub):
    done = ask(tmp_path, "Qwen/Other", "-tp", "8", HF_ENDPOINT=hub[0])
    assert done.returncode == 2
    assert "Qwen/Other is no folder or file here, and the hub gave no" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "env", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}]
)
def test_without_network(tmp_path, env):
    done = ask(tmp_path, REPO, "-tp", "8", **env)
    assert done.returncode == 2, done.stdout
    assert "Check name, network and HF_TOKEN, or download its config" in done.stderr
    assert "Traceback" not in done.stderr and "Retry" not in done.stderr


def test_a_hub_that_does_not_answer(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = ask(tmp_path, REPO, "-tp", "8", HF_ENDPOINT=address)
    assert done.returncode == 2, done.stdout
    assert "timed out. Check name, network and HF_TOKEN, or" in done.stderr
    assert "Retry" not in done.stderr


def test_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="pip install huggingface_hub, or give a"):
        checkpoint.read(REPO)


def test_what_modelopt_wrote_beside_config_json(tmp_path, hub):
    folder = tmp_path / "model"
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    (folder / "config.json").write_text(json.dumps(fields))
    blocks = {"quant_algo": "FP8_PB_WO"}
    said = {"producer": {"name": "modelopt"}, "quantization": blocks}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    done = ask(tmp_path, REPO, "-tp", "1", "--json", HF_ENDPOINT=hub[0])
    assert json.loads(done.stdout)["format"] == "modelopt", done.stderr
