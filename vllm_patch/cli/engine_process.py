# SPDX-License-Identifier: Apache-2.0
"""Starts ``engine_run`` in a process of its own, with or without the plugin."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_patch import plugin
from vllm_patch.cli import ENDING_SIGNALS

# What a run needs here and its user may have set otherwise. The CPU ones make
# several ranks share a small machine; other platforms ignore them.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
HEARTBEAT_SECONDS = 30
POLL_SECONDS = 1
# vLLM logs some errors that it survives as warnings.
_ERROR_LINE = re.compile(
    r"^(?!.*\bWARNING\b).*?(?:^|[ \t])"
    r"((?:\w+\.)*\w*(?:Error|Exception): .+|Worker proc \S+ died unexpectedly.*)$",
    re.MULTILINE,
)
_PADDED_LINE = re.compile(r"FP8 layers cut inside quant blocks: .+")
_OPERATORS_LINE = re.compile(r"FP8 operators on this CPU: .+")
# The machine gave out: -9 is how the kernel ends what takes too much memory.
_OUTSIDE = re.compile(r"code: -9\b|': -9\b|OutOfMemory|MemoryError|No space left on")
# What vLLM says of a worker that ended while it loaded. If it is the first error, the
# worker had none of its own.
_SILENT = "Exception: WorkerProc initialization failed"


@dataclass(frozen=True)
class EngineProcess:
    """One engine run to make.

    Attributes:
        label: What the table calls it.
        engine: Arguments for ``vllm.LLM``.
        patched: Whether this package's plugin is loaded.

    """

    label: str
    engine: dict[str, Any]
    patched: bool = False


@dataclass
class EngineResult:
    """What came of a run: ``scores`` of ``engine_run``, or an ``error``.

    Attributes:
        scores: Output of ``engine_run.run``, or None if the run failed.
        error: The engine's own error, or None.
        ended_outside: Whether time, memory or disk gave out, rather than the engine.
        padding: The plugin's log line, or None if it padded nothing.
        operators: Log lines of its processes that multiply FP8 weights by other means
            than vLLM does here, each once.
        seconds: Wall time of the process.
        peak_bytes: Most memory that its processes and this one took together, seen
            each second.

    """

    scores: dict[str, Any] | None
    error: str | None
    ended_outside: bool
    padding: str | None
    operators: list[str]
    seconds: float
    peak_bytes: int


def run(
    process: EngineProcess,
    batches: list[list[list[int]]],
    directory: Path,
    timeout: float,
) -> EngineResult:
    """Run the engine and wait for it, with a sign of life on stderr.

    Args:
        process: The run to make.
        batches: Of prompts, of token ids.
        directory: Where the log and the exchange files go.
        timeout: Seconds after which the run counts as failed.

    """
    stem = re.sub(r"\W+", "-", process.label)
    spec, out, log = (directory / f"{stem}.{end}" for end in ("spec", "out", "log"))
    spec.write_text(json.dumps({"engine": process.engine, "batches": batches}))
    out.unlink(missing_ok=True)  # Of an earlier run with the same --logs.
    command = [sys.executable, "-m", "vllm_patch.cli.engine_run", str(spec), str(out)]
    started = time.monotonic()
    with log.open("w") as sink, _noted_signals() as signals:
        child = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment(process.patched),
            start_new_session=True,
        )
        in_time, peak_bytes = _wait(child, started + timeout, signals)
    text = log.read_text(errors="replace")
    scores = None
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        scores = json.loads(out.read_text())
    errors = _ERROR_LINE.findall(text)
    errors.append(f"exit code {child.returncode} without an error")
    # 0 without scores: they are not whole.
    outside = not in_time or child.returncode in (0, -9) or _OUTSIDE.search(text)
    outside = outside or errors[0].startswith(_SILENT)
    error = errors[0] if in_time else f"no result after {timeout:.0f} s"
    return EngineResult(
        scores=scores,
        error=None if scores else error,
        ended_outside=not scores and bool(outside),
        padding=next(iter(_PADDED_LINE.findall(text)), None),
        operators=sorted(set(_OPERATORS_LINE.findall(text))),
        seconds=round(time.monotonic() - started, 1),
        peak_bytes=peak_bytes,
    )


def environment(patched: bool) -> dict[str, str]:
    """Return the child's environment; stock means neither plugin nor patches."""
    # Lines of level INFO are the proof of what the run did.
    env = {**ENVIRONMENT, **os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    if not patched:
        env["VLLM_PLUGINS"] = ",".join(_other_plugins())
        env.pop("VLLM_FP8_TP_PADDING", None)
        if plugin.built_in():
            env["VLLM_FP8_TP_PADDING"] = "off"
        return env
    if "VLLM_PLUGINS" in env:
        env["VLLM_PLUGINS"] = ",".join([*_other_plugins(), plugin.NAME])
    return {**env, "VLLM_FP8_TP_PADDING": "auto"}


def _other_plugins() -> list[str]:
    if "VLLM_PLUGINS" in os.environ:
        names = os.environ["VLLM_PLUGINS"].split(",")
    else:
        names = [
            point.name
            for group in metadata.entry_points().groups
            if group.startswith("vllm.")
            for point in metadata.entry_points(group=group)
        ]
    return sorted({name for name in names if name and name != plugin.NAME})


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Note the signals that would end this process, and handle the first at the end.

    Handled at once, one between the start of the engine and the wait for it would
    leave the engine behind.
    """
    noted: list[int] = []
    handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    for number, handler in handlers.items():
        # nohup ignores SIGHUP.
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if noted:
        signal.raise_signal(noted[0])


def _wait(
    child: subprocess.Popen, deadline: float, signals: list[int]
) -> tuple[bool, int]:
    """Wait for the child and its workers.

    Returns:
        False if they had to be killed; the most memory they took, bytes.

    """
    from tqdm import tqdm  # vLLM brings it, too.

    started = time.monotonic()
    heartbeat, peak_bytes = started + HEARTBEAT_SECONDS, 0
    # A clock, on a terminal only.
    clock = tqdm(bar_format="      ... {elapsed}", leave=False, disable=None)
    try:
        while not signals and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_SECONDS)
                return True, peak_bytes
            peak_bytes = max(peak_bytes, _memory())
            clock.refresh()
            now = time.monotonic()
            if clock.disable and now > heartbeat:
                heartbeat = now + HEARTBEAT_SECONDS
                say(f"      ... {now - started:.0f} s")
        return False, peak_bytes
    finally:
        clock.close()
        # A failed engine can leave workers behind, which hold memory.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def say(line: str) -> None:
    """Print a line about progress: the result alone goes to stdout."""
    print(line, file=sys.stderr, flush=True)


def _memory() -> int:
    """Return bytes of this process and all below it, shared pages counted once."""
    import psutil  # vLLM brings it; the other commands work without.

    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process()
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += each.memory_full_info().pss
    return total
