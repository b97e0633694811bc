"""The parity command around the engine: arguments, processes, verdict."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time

import psutil
import pytest

from tests.cli.check import files
from tests.cli.test_model_config import QWEN3_MOE
from vllm_patch import plugin, releases
from vllm_patch.cli import engine_process, parity
from vllm_patch.cli.engine_process import EngineProcess, EngineResult
from vllm_patch.cli.main import main

SCORES = {"logprobs": [-1.0, -2.0, -3.0], "top_tokens": [1, 2, 3]}
OUT_OF_TIME = "no result after 5 s"
SILENT = "Exception: WorkerProc initialization failed due to an exception in a backgr"
PADDING = "FP8 layers cut inside quant blocks: 2 MoE layers"


def shifted(by: float) -> dict:
    return {**SCORES, "logprobs": [value + by for value in SCORES["logprobs"]]}


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """An engine that gives prepared results; returns what it was asked to run."""

    class Engine:
        results = {
            "stock TP 1": (SCORES, None, None),
            "stock TP 4 (control)": (shifted(0.01), None, None),
            "stock TP 8": (None, "ValueError: 192 is not divisible", None),
            "patched TP 8": (shifted(0.01), None, PADDING),
        }
        operators = {}
        asked = []

    def run(process, batches, directory, timeout):
        Engine.asked.append((process, batches))
        scores, error, padding = Engine.results[process.label]
        operators = Engine.operators.get(process.label, [])
        ended = error == OUT_OF_TIME
        return EngineResult(scores, error, ended, padding, operators, 1.0, 3 << 30)

    monkeypatch.setattr(engine_process, "run", run)
    monkeypatch.setattr(parity, "_on_cpu", lambda: False)
    return Engine


@pytest.fixture
def model(tmp_path):
    return files.write(tmp_path / "model", json.loads(QWEN3_MOE.read_text()))


def run(model, *arguments) -> int:
    return main(["parity", "--model", str(model), "--tp", "8", *arguments])


DAMAGED = "ValueError: layers.0.o_proj.weight_scale_inv holds the scale nan."


def test_what_patched_says_of_a_damaged_checkpoint(engine, model, capsys, monkeypatch):
    """With which stock serves nonsense, so that nothing can be compared."""
    nonsense = (shifted(float("nan")), None, None)
    results = {"stock TP 1": nonsense, "patched TP 8": (None, DAMAGED, None)}
    monkeypatch.setattr(engine, "results", {**engine.results, **results})
    assert run(model) == 2
    assert capsys.readouterr().out.endswith(
        "CANNOT BE JUDGED: the control is inf nats from the baseline, too far to judge "
        f"by, and patched TP 8 failed: {DAMAGED}\n"
    )


def test_weights_that_no_run_could_load(engine, model, capsys):
    engine.asked.clear()
    (weights,) = model.glob("*.safetensors")
    size = weights.stat().st_size
    with weights.open("rb+") as opened:
        opened.truncate(size - 1)
    assert run(model) == 2
    assert "does not fit in" in capsys.readouterr().err
    weights.unlink()
    assert run(model) == 2
    assert "holds no weights (*.safetensors). Give the" in capsys.readouterr().err
    assert not engine.asked
    assert run(model, "--engine-args", '{"load_format": "dummy"}') == 0


def test_parity_holds(engine, model, capsys):
    assert run(model) == 0
    out = capsys.readouterr().out
    head, first = (" ".join(line.split()) for line in out.splitlines()[:2])
    assert head == "run result mean |dlogp| max |dlogp| top-1 seconds GiB"
    assert first == "stock TP 1 serves - - - 1 3.0"
    assert "stock TP 8: ValueError: 192 is not divisible" in out
    assert PADDING in out
    assert out.endswith("PARITY HOLDS\n")
    assert "exactly 0" not in out


@pytest.mark.parametrize(
    ("role", "result", "runs", "reason"),
    [
        (
            "patched TP 8",
            (shifted(0.5), None, PADDING),
            4,
            "NO PARITY: patched is farther from the baseline than noise explains",
        ),
        (
            "patched TP 8",
            (None, "ValueError: broken", None),
            4,
            "NO PARITY: patched TP 8 failed: ValueError: broken",
        ),
        (
            "patched TP 8",
            (None, OUT_OF_TIME, None),
            4,
            "CANNOT BE JUDGED: patched TP 8 failed: no result after 5 s",
        ),
        (
            "patched TP 8",
            (SCORES, None, None),
            4,
            (
                "CANNOT BE JUDGED: the plugin took no layer over: this TP size cuts no "
                "quant block, or the run's log (--logs) says why"
            ),
        ),
        (
            "stock TP 4 (control)",
            (shifted(0.3), None, None),
            4,
            (
                "CANNOT BE JUDGED: the control is 0.30 nats from the baseline, too far "
                "to judge by; try fewer --layers or another --control-tp"
            ),
        ),
        (
            "stock TP 1",
            (None, "OSError: gone", None),
            1,
            "CANNOT BE JUDGED: stock TP 1 failed: OSError: gone",
        ),
        (
            "stock TP 4 (control)",
            (None, OUT_OF_TIME, None),
            2,
            "CANNOT BE JUDGED: stock TP 4 (control) failed: no result after 5 s",
        ),
    ],
)
def test_what_is_not_parity_says_why(
    engine, model, tmp_path, capsys, role, result, runs, reason
):
    out = tmp_path / "out.json"
    engine.results[role] = result
    is_judged = reason.startswith("NO PARITY")
    assert run(model, "--json", str(out)) == (1 if is_judged else 2)
    assert len(engine.asked) == runs
    assert capsys.readouterr().out.endswith(f"{reason}\n")
    assert json.loads(out.read_text())["parity"] is (False if is_judged else None)


def test_a_control_of_exactly_0_is_said_and_denies_nothing(engine, model, capsys):
    engine.results["stock TP 4 (control)"] = (SCORES, None, None)
    assert run(model) == 2
    out = capsys.readouterr().out
    assert "max 0.0100 (the control is exactly 0: it saw no noise)" in out
    assert "control has the same TP or is exactly 0" in out.splitlines()[-1]
    engine.results["patched TP 8"] = (SCORES, None, PADDING)
    assert run(model) == 0


@pytest.mark.parametrize(
    ("by", "code", "last"),
    [
        # As far as an engine as good as stock at another TP, and less.
        (0.0064, 2, "CANNOT BE JUDGED: patched is farther from the baseline than the"),
        (0.004, 0, "PARITY HOLDS"),
        (0.2, 1, "NO PARITY: patched is farther from the baseline than noise"),
    ],
)
def test_a_control_at_the_same_tp_misses_some_noise(
    engine, model, monkeypatch, capsys, by, code, last
):
    engine.results |= {
        "stock TP 1, prompt by prompt (control)": (shifted(0.0001), None, None),
        "patched TP 8": (shifted(by), None, PADDING),
    }
    assert run(model, "--control-tp", "1") == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(last)


def test_stock_may_serve_too(engine, model):
    """From 0.29 on stock has a slower way on some GPUs."""
    engine.results["stock TP 8"] = (SCORES, None, None)
    assert run(model) == 0


def test_json_for_machines(engine, model, tmp_path):
    out = tmp_path / "out.json"
    assert run(model, "--json", str(out)) == 0
    report = json.loads(out.read_text())
    assert report["parity"] is True
    assert report["runs"]["stock"]["error"] == "ValueError: 192 is not divisible"
    assert report["runs"]["patched"]["difference"]["mean"] == pytest.approx(0.01)
    assert report["runs"]["patched"]["engine"]["tensor_parallel_size"] == 8


def test_what_the_engine_is_asked_for(engine, model):
    assert run(model, "--engine-args", '{"max_model_len": 512}') == 0
    processes = [process for process, _ in engine.asked]
    assert [p.patched for p in processes] == [False, False, False, True]
    assert {p.engine["max_model_len"] for p in processes} == {512}
    batches = [batches for _, batches in engine.asked]
    assert all(each == batches[0] for each in batches)


def test_operators_that_are_not_vllms_are_told(engine, model, capsys):
    engine.operators = dict.fromkeys(engine.results, ["abacus"])
    assert run(model) == 0
    assert "abacus" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("other", [[], ["abacus", "slide rule"]])
def test_runs_by_other_operators_are_not_compared(engine, model, capsys, other):
    engine.operators = dict.fromkeys(engine.results, ["abacus"])
    engine.operators["patched TP 8"] = other
    assert run(model) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert "CANNOT BE JUDGED: the runs differ in more than TP: " in last
    assert "abacus" in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "0"], "--tp 0: give a positive number."),
        (["--layers", "1"], "--layers shrinks a synthetic checkpoint"),
        (["--json", "/nowhere/out.json"], "No such file or directory: '/nowhere/"),
        (["--json", "/tmp"], "Is a directory: '/tmp'"),
        (["--logs", f"{__file__}/logs"], "Not a directory: '"),
        (["--timeout", "0"], "--timeout 0.0: give a positive number"),
        (["--tp", "4"], "--tp 4 keeps the quant blocks of"),
        (["--tp", "1000000000"], "--tp 1000000000: give a number from 1 to"),
        (["--tp", "7"], "--tp 7 does not divide num_attention_heads 8."),
        (["--tp", "16"], "--tp 16 does not divide num_attention_heads 8."),
        (["--engine-args", '{"model": "x"}'], "--engine-args sets model, which parity"),
        (["--baseline-tp", "16"], "--baseline-tp 16 does not divide num_attention"),
        (["--control-tp", "16"], "--control-tp 16 does not divide num_attention"),
        (["--control-tp", "2000"], "--control-tp 2000: give a number from 1 to 1024"),
        (["--control-tp", "-1"], "--control-tp -1: give a positive number."),
        (["--logs", __file__], "File exists: '"),
    ],
)
def test_wrong_usage_is_exit_code_2(engine, model, capsys, arguments, message):
    assert run(model, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not engine.asked


@pytest.mark.parametrize(
    ("text", "message"),
    [(text, f"{text!r} is not a JSON object such as") for text in ("{bad", "[]")],
)
def test_engine_arguments_that_are_no_object(engine, model, capsys, text, message):
    with pytest.raises(SystemExit, match="2"):
        run(model, "--engine-args", text)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"model_type": "abacus"}, [], "no model for Transformers: The checkpoint you"),
        ({"num_hidden_layers": None}, ["--layers", "1"], "num_hidden_layers = None"),
    ],
)
def test_a_config_that_no_checkpoint_can_be_written_for(
    engine, tmp_path, capsys, changes, arguments, message
):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(QWEN3_MOE.read_text()), **changes}))
    assert main(["parity", "--config", str(file), "--tp", "8", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not engine.asked


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("torn")])
def test_what_goes_wrong_is_not_a_verdict(
    engine, model, monkeypatch, tmp_path, capsys, error
):
    """Python's own exit code would say "no parity", and an earlier result something."""
    out = tmp_path / "out.json"
    out.write_text('{"parity": true}')

    def fail(*_args):
        raise error

    monkeypatch.setattr(engine_process, "run", fail)
    assert run(model, "--json", str(out)) == 2
    assert str(error) in capsys.readouterr().err
    assert not out.exists()


def test_a_model_that_is_not_here(engine, capsys):
    assert run("Qwen/Qwen3-235B-A22B-FP8") == 2
    assert "give a local folder with config.json and weights" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_run_leaves_nothing_behind(tmp_path, number):
    """A timeout, a cancelled job or a closed terminal ends the engine too."""
    child = tmp_path / "python"
    child.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/engine\nexec sleep 600\n")
    child.chmod(0o755)
    files.write(tmp_path / "model", json.loads(QWEN3_MOE.read_text()))
    script = f"""
import signal, sys
from vllm_patch import plugin, releases
from vllm_patch.cli import engine_process, main
# Under nohup it is ignored, as it then should be.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
plugin.unsupported = lambda version: None
engine_process.sys.executable = {str(child)!r}
sys.exit(main.main(["parity", "--model", {str(tmp_path / "model")!r}, "--tp", "8"]))
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}) as job:
        deadline = time.monotonic() + 60
        while not (tmp_path / "engine").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        try:
            job.send_signal(number)
            assert job.wait(30) == 128 + number
        finally:
            job.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "engine").read_text()), 0)
    assert not list(tmp_path.glob("vllm-patch-parity-*"))


def test_a_signal_as_soon_as_the_engine_starts(tmp_path, monkeypatch):
    """Before anything waits for it: it is ended all the same."""
    engines = []

    class Signalled(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(["sleep", "600"], start_new_session=True)
            engines.append(self)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(engine_process.subprocess, "Popen", Signalled)
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(number))
    try:
        with pytest.raises(SystemExit, match=str(int(signal.SIGTERM))):
            engine_process.run(EngineProcess("stock", {}), [], tmp_path, 60)
    finally:
        signal.signal(signal.SIGTERM, before)
        left = engines[0].poll() is None
        engines[0].kill()
    assert not left


def test_a_folder_without_a_model(engine, tmp_path, capsys):
    assert run(tmp_path) == 2
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "built_in", "patched", "told"),
    [
        ("VLLM_PLUGINS", "other,vllm_patch", False, False, "other"),
        ("VLLM_PLUGINS", "other", False, True, "other,vllm_patch"),
        ("VLLM_PLUGINS", None, False, True, None),
        # The patched run pads, and says so.
        ("VLLM_FP8_TP_PADDING", "auto", False, False, None),
        ("VLLM_FP8_TP_PADDING", "off", False, True, "auto"),
        ("VLLM_LOGGING_LEVEL", "WARNING", False, True, "INFO"),
        # A patched vLLM pads without the plugin, unless it is told not to.
        ("VLLM_FP8_TP_PADDING", "auto", True, False, "off"),
        ("VLLM_FP8_TP_PADDING", "auto", True, True, "auto"),
    ],
)
def test_what_a_run_is_told(monkeypatch, name, value, built_in, patched, told):
    monkeypatch.setattr(plugin, "built_in", lambda: "built in" if built_in else None)
    monkeypatch.delenv(name, raising=False)
    if value:
        monkeypatch.setenv(name, value)
    assert engine_process.environment(patched).get(name) == told


def test_stock_runs_load_no_plugin_of_ours(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    stock = engine_process.environment(patched=False)
    assert "vllm_patch" not in stock["VLLM_PLUGINS"].split(",")


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Return what runs a shell script in the place of the engine."""
    child = tmp_path / "python"
    monkeypatch.setattr(engine_process.sys, "executable", str(child))

    def run_script(script: str, timeout: float = 30) -> EngineResult:
        child.write_text(f"#!/bin/sh\n{script}\n")
        child.chmod(0o755)
        process = EngineProcess("stock TP 8", {})
        return engine_process.run(process, [], tmp_path, timeout)

    return run_script


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (
            (
                "(Worker pid=1) ERROR [x.py:9]     raise ValueError(f'192')\n"
                "(Worker pid=1) ERROR [x.py:9] ValueError: 192 is not divisible\n"
                "RuntimeError: Engine core initialization failed.\n"
            ),
            "ValueError: 192 is not divisible",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory\n", None),
        (
            (
                "(Core) ERROR [m.py:3] Worker proc VllmWorker-0 died unexpectedly "
                "(exit code: -11)\nRuntimeError: cancelled\n"
            ),
            "Worker proc VllmWorker-0 died unexpectedly (exit code: -11)",
        ),
        (
            "(Main) WARNING [y.py:3] ValueError: survived\nOSError: gone\n",
            "OSError: gone",
        ),
        ("Killed\n", "exit code 3 without an error"),
    ],
)
def test_the_engines_own_error_is_found(tmp_path, run_script, log, error):
    result = run_script(f"cat <<'END'\n{log}END\nexit 3")
    assert result.error == (error or log.strip())
    assert (tmp_path / "stock-TP-8.log").read_text() == log
    assert result.ended_outside == ("OutOfMemory" in log)


def test_an_earlier_runs_result_is_not_this_ones(run_script):
    """With the same --logs."""
    result = run_script('echo "[1]" > "$4"')
    assert result.scores == [1] and result.error is None
    result = run_script("exit 3")
    assert result.scores is None and result.error == "exit code 3 without an error"


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo '{\"logprobs\": [1' > $4", "exit code 0 without an error"),
        ("kill -9 $$", "exit code -9 without an error"),
        (
            "echo 'Worker proc W-0 died unexpectedly (exit code: -9)'; exit 1",
            "Worker proc W-0 died unexpectedly (exit code: -9)",
        ),
        (
            "echo OSError: [Errno 28] No space left on device; exit 1",
            "OSError: [Errno 28] No space left on device",
        ),
        (f"echo '(Core) ERROR {SILENT}'; exit 1", SILENT),
    ],
)
def test_what_the_machine_ended_is_told_apart(run_script, script, error):
    result = run_script(script)
    assert result.error == error and result.ended_outside


def test_a_workers_own_error_is_the_engines(run_script):
    own = "ValueError: 192 is not divisible"
    result = run_script(f"echo '(Worker) ERROR {own}\n(Core) ERROR {SILENT}'; exit 1")
    assert result.error == own and not result.ended_outside


def test_what_an_engine_multiplies_by_is_read_from_its_log(run_script):
    line = "FP8 operators on this CPU: abacus"
    log = f"(Main) WARNING [x.py:1] {line}\n(Worker) WARNING [x.py:1] {line}"
    assert run_script(f"echo '{log}'").operators == [line]


def test_a_run_that_hangs_is_ended_with_its_workers(
    tmp_path, monkeypatch, run_script, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine_process, "HEARTBEAT_SECONDS", 0.5)
    result = run_script("sleep 600 & echo $! > worker\nwait", timeout=1)
    assert result.error == "no result after 1 s" and result.ended_outside
    assert re.fullmatch(r"(      \.\.\. \d+ s\n)+", capsys.readouterr().err)
    # Two small processes, and this one.
    own = psutil.Process().memory_full_info().pss
    assert 1e5 < result.peak_bytes - own < 1e8
    worker = int((tmp_path / "worker").read_text())
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(worker, 0)


def test_a_terminal_has_a_clock_and_no_lines(monkeypatch, run_script):
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    monkeypatch.setattr(engine_process, "HEARTBEAT_SECONDS", 0)
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(engine_process.sys, "stderr", stderr)
        assert run_script("sleep 600", timeout=1).ended_outside
        # The terminal's end is the end of what it was sent.
        print("end", file=stderr, flush=True)
        shown = ""
        while not shown.endswith("end\r\n"):
            shown += os.read(ours, 10_000).decode()
    os.close(ours)
    assert "... 00:0" in shown and " s\r\n" not in shown


def test_parity_without_a_known_vllm_is_refused(monkeypatch, model, capsys):
    monkeypatch.setattr(releases, "installed", lambda: "0.1.0")
    assert run(model) == 2
    assert "this is vLLM 0.1.0, and 0.26.0 to 0.33.0" in capsys.readouterr().err
