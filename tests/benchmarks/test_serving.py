"""Servers and their clients, with a command that stands for ``vllm``."""

import contextlib
import json
import os
import signal
import sys

import pytest

from benchmarks import serving
from benchmarks.engine_ways import COMMON, GRAPH_SIZES

# Notes its arguments; serves until it is ended, and saves what vLLM would.
VLLM = """
import json, os, sys, time
name, *given = sys.argv[1:]
gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
with open(os.environ["NOTES"], "a") as file:
    file.write(json.dumps([name, given, gpus, os.getpid()]) + chr(10))
if name == "serve":
    time.sleep(float(os.environ["SERVES_SECONDS"]))
    sys.exit(3)
told = dict(zip(given, given[1:]))
sequences = int(told["--num-prompts"])
time.sleep(float(os.environ["BENCH_SECONDS"]))
found = {"num_prompts": sequences, "completed": sequences, "output_throughput": 100.0}
port = int(told["--base-url"].split(":")[-1])
for name in ("median_ttft_ms", "p90_ttft_ms", "median_tpot_ms", "p90_tpot_ms"):
    found[name] = float(port)
found["completed"] -= os.environ.get("ONE_FAILS") == told["--random-output-len"]
with open(os.path.join(told["--result-dir"], told["--result-filename"]), "w") as file:
    json.dump(found, file)
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs a spec: rows, and what commands were told."""
    notes = tmp_path / "notes"
    (tmp_path / "vllm.py").write_text(VLLM)
    monkeypatch.setattr(serving, "VLLM", [sys.executable, str(tmp_path / "vllm.py")])
    monkeypatch.setenv("NOTES", str(notes))
    monkeypatch.setenv("SERVES_SECONDS", "600")
    monkeypatch.setenv("BENCH_SECONDS", "0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def told():
        return [json.loads(line) for line in notes.read_text().splitlines()]

    def measure(servers: int):
        engine = {"model": "m", "tensor_parallel_size": 4, "enforce_eager": True}
        engine |= {"enable_prefix_caching": False}
        engine["compilation_config"] = {"cudagraph_capture_sizes": [1, 4]}
        spec = {"servers": servers, "concurrent": [1, 6], "input": 16, "output": 9}
        rows = []
        serving.run({**spec, "engine": engine}, rows.append)
        return rows, told()

    yield measure
    for *_, process in told():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("servers", [1, 2])
def test_servers_share_gpus_and_sequences(run, servers):
    (load, *rows), told = run(servers)
    assert load["measure"] == "load_s"
    names = ["output_tokens_s", "ttft_ms", "tpot_ms"]
    assert [(r["measure"], r["tokens"], r["context"]) for r in rows] == [
        (name, n, 16) for n in (1, 6) for name in names
    ]
    # One sequence is one server's; of several servers, what they do is added up.
    totals = [r["value"] for r in rows if r["measure"] == "output_tokens_s"]
    assert totals == [100, 100 * servers]
    gpus = sorted(gpus for name, _, gpus, _ in told if name == "serve")
    assert gpus == ["0,1,2,3", "4,5,6,7"][:servers]
    ports = [int(g[g.index("--port") + 1]) for name, g, *_ in told if name == "serve"]
    assert rows[-1]["value"] == rows[-1]["p90"] == max(ports), "the slower one's"
    clients = [
        tuple(int(given[given.index(name) + 1]) for name in names)
        for names in [("--num-prompts", "--random-output-len", "--seed")]
        for kind, given, *_ in told
        if kind == "bench"
    ]
    prompts = [each[:2] for each in clients]
    each = 6 // servers
    assert sorted(prompts) == sorted(
        [(each, 8)] * servers + [(each, 9)] * servers + [(1, 9)]
    )
    assert len({*clients}) == 3, "no prompts come again"
    given = next(given for name, given, *_ in told if name == "serve")
    assert given[0] == "m" and "--enforce-eager" in given
    config = given[given.index("--compilation-config") + 1]
    assert json.loads(config) == {"cudagraph_capture_sizes": [1, 4]}


def test_vllm_takes_the_arguments():
    """Those of the engine's benchmark, as the installed release spells them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    given = {**COMMON, "compilation_config": {"cudagraph_capture_sizes": GRAPH_SIZES}}
    args = parser.parse_args([*serving.flags(given)])
    assert args.enable_prefix_caching is False and args.disable_log_stats is True
    assert args.seed == 0


def test_a_request_that_fails_is_an_error(run, monkeypatch):
    monkeypatch.setenv("ONE_FAILS", "9")
    with pytest.raises(SystemExit, match="0 of 1 requests were answered"):
        run(1)


def test_a_server_that_ends_is_not_waited_for(run, monkeypatch):
    monkeypatch.setenv("SERVES_SECONDS", "0")
    monkeypatch.setenv("BENCH_SECONDS", "30")
    with pytest.raises(SystemExit, match="a server ended with 3"):
        run(1)
