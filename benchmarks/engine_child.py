"""Processes of ``benchmarks.engine``, each of which starts engines and writes rows."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.engine_row import END, Row
from vllm_patch.cli import engine_process

ENVIRONMENT = {
    # The engine in the process that measures it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Its warm-up takes many minutes. Linear layers are the same for all ways; experts
    # of expert parallelism, which are DeepGEMM's without FlashInfer's, become Triton's.
    "VLLM_USE_DEEP_GEMM": "0",
}
# Clients that wait for a server warn; engines name the error of a worker before.
SAYS_NOTHING = "WARNING", "See root cause above", "WorkerProc initialization failed"
SECONDS = 900
POLL_SECONDS = 0.5


class RowFailed(Exception):
    """A process ended without a result; the message is the first line of why."""

    def __init__(self, why: str, log: str = ""):
        super().__init__(why)
        self.log = log


class OutOfTime(Exception):
    """``--minutes`` are over."""


def process(
    spec: dict[str, Any],
    variables: dict[str, str],
    module: str = "benchmarks.engine_row",
    known: Callable[[Row], None] = lambda row: None,
    deadline: float = float("inf"),
) -> list[Row]:
    """Return the rows of a process of a module; each is ``known`` at once.

    Raises:
        RowFailed: It ended before all of them, or did not end.
        OutOfTime: The deadline is over.

    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "spec.json", Path(folder) / "rows"
        given.write_text(json.dumps(spec))
        found.touch()
        command = [sys.executable, "-m", module, given, found]
        until = min(deadline, time.monotonic() + SECONDS)
        # A message may hold what the terminal would not show.
        with (
            open(Path(folder) / "log", "w+", errors="replace") as log,
            found.open() as lines,
            _started(command, variables, log) as child,
        ):
            for row in _read_while(child, lines, until):
                rows.append(row)
                known(row)
                if row.get("measure") == END:
                    break
            if rows and rows[-1].get("measure") == END:
                return rows
            if time.monotonic() >= deadline:
                raise OutOfTime
            if child.poll() is None:
                raise RowFailed(f"not done after {SECONDS} s")
            log.seek(0)
            text = log.read()
            raise RowFailed(_reason(text), text)


@contextlib.contextmanager
def _started(
    command: list[Any], variables: dict[str, str], log: TextIO
) -> Iterator[subprocess.Popen]:
    """Start a process; end it with all that it started."""
    on_cpu = {} if torch.cuda.is_available() else engine_process.ENVIRONMENT
    child = subprocess.Popen(
        command,
        env={**on_cpu, **os.environ, **ENVIRONMENT, **variables},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _read_while(
    child: subprocess.Popen, lines: TextIO, until: float
) -> Iterator[dict[str, Any]]:
    """Yield what each line says, until the process ends or the time is over."""
    part, ended = "", False
    while not ended and time.monotonic() < until:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(POLL_SECONDS)
            ended = True
        *whole, part = (part + lines.read()).split("\n")
        yield from map(json.loads, whole)


def _reason(log: str) -> str:
    """Return the last error that a log names; the last line where it names none."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [
        line
        for line in lines
        if "Error: " in line and not any(text in line for text in SAYS_NOTHING)
    ]
    return (errors or lines or ["no output"])[-1][-300:]
