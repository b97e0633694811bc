"""What clients see: ``vllm serve``, and ``vllm bench serve`` beside it.

``python -m benchmarks.serving SPEC OUT`` is a process of ``benchmarks.engine``, which
ends what this one starts: one server, or several side by side with GPUs and sequences
shared out, and clients that measure them.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import engine_row

VLLM = [sys.executable, "-m", "benchmarks.vllm_on_any_cpu"]
# Of the clients: the first waits for a server that loads, and warms it up.
START_SECONDS = 600
WARM_UP_TOKENS = 8
POLL_SECONDS = 0.2


def run(spec: dict[str, Any], known: Callable[[engine_row.Row], None]) -> None:
    """Start a spec's servers, and measure each number of sequences at a time."""
    started = time.monotonic()
    lengths = spec["input"], spec["output"]
    with tempfile.TemporaryDirectory() as folder:
        servers = [_start(spec, index) for index in range(spec["servers"])]
        most, few = max(spec["concurrent"], default=1), (lengths[0], WARM_UP_TOKENS)
        _bench(spec, servers, most, few, Path(folder), START_SECONDS)
        known({"measure": "load_s", "value": time.monotonic() - started})
        for concurrent in spec["concurrent"]:
            found = _bench(spec, servers, concurrent, lengths, Path(folder))
            for row in rows(found, concurrent):
                known({**row, "context": lengths[0]})


def rows(found: list[dict[str, Any]], concurrent: int) -> list[engine_row.Row]:
    """Return rows of what a client of each server saved.

    Raises:
        SystemExit: A request failed.

    """
    for each in found:
        if each["completed"] != each["num_prompts"]:
            raise SystemExit(
                f"RequestError: {each['completed']} of {each['num_prompts']} requests "
                f"were answered, {concurrent} at a time"
            )
    total = sum(each["output_throughput"] for each in found)
    added = [{"measure": "output_tokens_s", "tokens": concurrent, "value": total}]
    for name in ("ttft_ms", "tpot_ms"):
        # Of servers alike, that of the slower one.
        value, p90 = (
            max(each[f"{kind}_{name}"] for each in found) for kind in ("median", "p90")
        )
        row = {"measure": name, "tokens": concurrent, "value": value, "p90": p90}
        added.append(row)
    return added


def flags(arguments: dict[str, Any]) -> Iterator[str]:
    """Yield arguments as Python spells them as those of a command."""
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        else:
            yield f"--{option}"
            yield json.dumps(value) if isinstance(value, dict) else str(value)


def _start(spec: dict[str, Any], index: int) -> tuple[subprocess.Popen, str]:
    """Start a server on GPUs of its own; return it and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = {**spec["engine"], "host": "127.0.0.1", "port": port}
    command = [*VLLM, "serve", engine.pop("model"), *flags(engine)]
    size = engine["tensor_parallel_size"]
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(64)))
    mine = ",".join(gpus.split(",")[index * size : (index + 1) * size])
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": mine}
    return subprocess.Popen(command, env=env), f"http://127.0.0.1:{port}"


def _bench(
    spec: dict[str, Any],
    servers: list[tuple[subprocess.Popen, str]],
    concurrent: int,
    lengths: tuple[int, int],
    folder: Path,
    wait_seconds: int = 0,
) -> list[dict[str, Any]]:
    """Return what a client of each server measures, as vLLM saves it.

    Raises:
        SystemExit: A server or a client ended; its own error is in the log.

    """
    clients = []
    for index, (_, address) in enumerate(servers[:concurrent]):
        out = folder / f"{index}.json"
        out.unlink(missing_ok=True)
        options = {
            "model": spec["engine"]["model"],
            "base_url": address,
            "dataset_name": "random",
            "random_input_len": lengths[0],
            "random_output_len": lengths[1],
            "ignore_eos": True,
            "num_prompts": -(-concurrent // len(servers)),
            # No server gets the same prompts again.
            "seed": 1000 * lengths[1] + concurrent,
            "ready_check_timeout_sec": wait_seconds,
            "percentile_metrics": "ttft,tpot",
            "metric_percentiles": 90,
            "disable_tqdm": True,
            "save_result": True,
            "result_dir": folder,
            "result_filename": out.name,
        }
        command = [*VLLM, "bench", "serve", *flags(options)]
        clients.append((subprocess.Popen(command), out))
    while any(client.poll() is None for client, _ in clients):
        if ended := [server for server, _ in servers if server.poll() is not None]:
            raise SystemExit(f"a server ended with {ended[0].returncode}")
        time.sleep(POLL_SECONDS)
    if not all(out.is_file() for _, out in clients):
        raise SystemExit("a client ended without a result")
    return [json.loads(out.read_text()) for _, out in clients]


if __name__ == "__main__":
    engine_row.main(*sys.argv[1:], run)
