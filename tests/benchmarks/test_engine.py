"""The engine's benchmark, with processes that answer at once."""

import contextlib
import csv
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    communication,
    engine,
    engine_check,
    engine_child,
    engine_row,
    engine_rows,
    engine_ways,
    plot_engine,
)
from benchmarks.engine_models import MODELS

MODEL = MODELS[0]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_models_are_cut(model):
    config = model.config()
    size = config.get("moe_intermediate_size") or config["intermediate_size"]
    assert size % (128 * model.tp_size), model.why
    skipped = config["quantization_config"]["modules_to_not_convert"]
    assert len(skipped) == 1 + config["num_hidden_layers"]
    assert model.config(3)["num_hidden_layers"] == 3


def test_the_model_of_communication_is_near_what_is_published():
    """8 x H100, NCCL; the last is 418 GB/s of bus bandwidth."""
    largest = 128 << 20
    published = {
        **{16 << 10: 20.7, 512 << 10: 25.2, 1 << 20: 32.4, 4 << 20: 59.4},
        **{8 << 20: 90.5, 16 << 20: 135.7, largest: largest * 2 * 7 / 8 / 418e3},
    }
    for num_bytes, microseconds in published.items():
        ratio = communication.all_reduce_us(num_bytes) / microseconds
        assert 2 / 3 < ratio < 4 / 3, num_bytes
    assert communication.step_ms(1, 4096, 94) == pytest.approx(188 * 0.01904, rel=1e-3)


class Processes:
    """What stands for processes of rows: they note what they are told."""

    def __init__(self):
        self.told = []
        self.failing: set[str] = set()
        self.layers = 94
        self.logits = {"this": 1.001, "padded": 1.0, "refined": 1.01}
        # Rows after which the time is over.
        self.in_time = 10**6

    def __call__(self, spec, variables, module=None, known=None, deadline=None):
        tp_size = spec.get("tp_size") or spec["engine"]["tensor_parallel_size"]
        given = {**variables, **spec["engine"], "tp_size": tp_size}
        ways = {
            name: {
                **{**each.environment, **each.engine},
                "tp_size": MODEL.tp_size // (1 + each.halves),
            }
            for name, each in engine_ways.WAYS.items()
        }
        # Expert parallelism is stock with one argument more.
        fitting = [name for name, said in ways.items() if said.items() <= given.items()]
        way = max(fitting, key=lambda name: len(ways[name]))
        self.told.append((way, spec, variables))
        if way in self.failing:
            raise engine_child.RowFailed("ValueError: refused")
        if "logits" in spec:
            torch.save(torch.full((2, 8), self.logits[way]), spec["logits"])
            return []
        config = json.loads(Path(spec["engine"]["model"], "config.json").read_text())
        assert config["num_hidden_layers"] == self.layers
        rows = self.rows(spec, 1 if way == "this" else 1.5)
        for row in rows:
            self.in_time -= 1
            if self.in_time < 0:
                raise engine_child.OutOfTime
            known({"experts": "Triton 192", **row})
        return rows

    def rows(self, spec, factor) -> list[dict]:
        if "servers" in spec:
            assert Path(spec["engine"]["model"], "tokenizer.json").is_file()
            rows = [
                {
                    "measure": "tpot_ms",
                    "tokens": n,
                    "context": 1024,
                    "value": factor * n,
                }
                for n in spec["concurrent"]
            ]
        else:
            rows = [
                {
                    "measure": "decode_ms",
                    "tokens": n,
                    "context": 1024,
                    "value": factor * n,
                }
                for n in (1, 16)
            ]
            rows.append({"measure": "prefill_ms", "tokens": 512, "value": 7 * factor})
        return [*rows, {"measure": "total_s", "value": 100.0}]


@pytest.fixture
def processes(monkeypatch):
    found = Processes()
    monkeypatch.setattr(engine_child, "process", found)
    monkeypatch.setattr(engine_check, "_write_small", lambda model, folder: None)
    tokenizer = lambda size, folder: (folder / "tokenizer.json").touch()  # noqa: E731
    monkeypatch.setattr(engine, "write_tokenizer", tokenizer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    return found


@pytest.fixture
def run(processes, tmp_path):
    """Return a function that runs the command: exit status and rows."""
    path = tmp_path / "engine.csv"

    def command(*options):
        code = engine.main(["--csv", str(path), "--commit", "abc", *options])
        with open(path, newline="") as file:
            return code, list(csv.DictReader(file))

    return command


def test_a_process_for_each_way(run, processes):
    code, rows = run()
    assert code == 0
    ways = [way for way, *_ in processes.told]
    checked, timed = ways[:3], ways[3:]
    assert checked == ["this", "padded", "refined"]
    assert timed == 2 * ["this", "padded", "refined", "ep"]
    for way, spec, variables in processes.told[3:]:
        assert spec["random_routing"]
        assert "VLLM_MOE_ROUTING_SIMULATION_STRATEGY" not in variables
        assert spec["engine"].get("enable_expert_parallel", False) == (way == "ep")
        assert spec["rank"] == 1
    logits, first = rows[:2]
    assert [logits[name] for name in ("measure", "value", "p90")] == [
        *("logits", "0.001", "0.01")
    ]
    assert (first["gpu"], first["commit"], first["layers"]) == (
        "NVIDIA H200",
        "abc",
        "94",
    )
    assert float(first["communication_ms"]) == pytest.approx(188 * 0.01904, rel=1e-3)


def test_logits_that_are_off_are_a_problem(run, processes, capsys):
    processes.logits["this"] = 1.02
    code, _ = run("--ways", "this")
    assert code == 1
    assert "logits differ by 2.00e-02 of at most 1.00e-02" in capsys.readouterr().out


def test_where_stock_refuses_the_bound_is_fixed(run, processes, capsys):
    processes.failing = {"refined"}
    assert run()[0] == 0
    processes.logits["this"] = 1 + 2 * engine_check.TOLERATED
    assert run()[0] == 1


def test_what_fails_is_a_row_and_the_others_go_on(run, processes):
    processes.failing = {"ep"}
    code, rows = run("--no-check", "--modes", "graphs")
    assert code == 0
    (error,) = [row for row in rows if row["measure"] == "error"]
    assert (error["way"], error["value"]) == ("ep", "ValueError: refused")
    processes.failing = {"this"}
    assert run("--no-check", "--modes", "graphs")[0] == 1


def test_resuming_leaves_out_what_is_there(run, processes):
    _, before = run("--modes", "graphs")
    processes.told.clear()
    code, after = run("--resume")
    assert code == 0
    assert [way for way, *_ in processes.told] == ["this", "padded", "refined", "ep"]
    assert after[: len(before)] == before and len(after) == len(before) + 4 * 4


def test_what_fails_is_tried_again(run, processes):
    options = "--modes", "graphs", "--ways", "this", "--resume"
    processes.failing = {"this"}
    assert run(*options, "--no-check")[0] == run(*options, "--no-check")[0] == 1
    processes.failing, processes.logits["this"] = set(), 1.02
    assert run(*options)[0] == run(*options)[0] == 1
    processes.logits["this"] = 1.001
    code, rows = run(*options)
    assert code == 0 and rows[-1]["measure"] == "logits"


def test_all_gpus_serve_and_no_rank_pretends(run, processes):
    code, rows = run("--gpus", "8", "--no-check")
    assert code == 0
    ways = ["this", "ep", "half", "refined", "padded"]
    assert [way for way, *_ in processes.told] == 2 * ways
    for way, spec, variables in processes.told:
        size, given = (4 if way == "half" else 8), spec["engine"]
        assert "rank" not in spec and given["tensor_parallel_size"] == size
        assert "disable_custom_all_reduce" not in given, "ranks do talk"
        assert variables["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] == "uniform_random"
        if "servers" in spec:
            assert spec["servers"] * size == 8 and "async_scheduling" not in given
            assert spec["concurrent"] == [1, 16, 64, 256]
        elif way == "half":
            assert {8, 16, 32, 128} <= {*spec["decode"][1024]}, "its half, and all"
    assert {row["ranks"] for row in rows} == {"8"}
    assert {row["communication_ms"] for row in rows} == {""}, "nothing is modelled"


@pytest.mark.parametrize("in_time", [0, 1, 4, 19, 22])
def test_what_is_left_when_time_is_over_is_resumed(run, processes, in_time):
    """Rows of a process that was ended stay, and are not measured again."""
    options = "--gpus", "8", "--no-check", "--resume"
    processes.in_time = in_time
    code, before = run(*options, "--minutes", "9")
    assert code == 1 and len(before) == in_time
    processes.in_time = 10**6
    code, after = run(*options)
    assert code == 0 and after[:in_time] == before
    places = [(r["mode"], r["way"], *engine_rows.place(r)) for r in after]
    assert len(places) == len({*places}) == 5 * (4 + 5)
    told = [spec["concurrent"] for _, spec, _ in processes.told if "servers" in spec]
    assert ([64, 256] in told) == (in_time == 22)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--gpus", "4"], "--gpus 4: Qwen3-235B-TP8 has 8 ranks"),
        (["--gpus", "16"], "--gpus 16: there are 8"),
        (["--modes", "served"], "one rank alone serves nobody"),
        (["--gpus", "8", "--resume"], "engine.csv has no rows of --gpus 8"),
        (["--layers", "2", "--resume"], "engine.csv has rows of 94 layers"),
    ],
)
def test_arguments_that_do_not_fit(run, capsys, options, why):
    run("--no-check", "--modes", "graphs", "--ways", "this")
    with pytest.raises(SystemExit):
        run(*options)
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (False, 1), (None, 1)])
def test_parity_of_all_gpus_comes_first(run, monkeypatch, holds, code):
    def parity(command):
        told = dict(zip(command[1::2], command[2::2], strict=True))
        config = json.loads(Path(told["--config"]).read_text())
        assert command[0] == "parity" and told["--tp"] == "8"
        assert config["moe_intermediate_size"] == 1536, "what is cut is as it is"
        runs = {r: {"difference": {"mean": m}} for r, m in gaps.items()}
        report = {"parity": holds, "failure": "too far", "runs": runs}
        if holds is not None:
            Path(told["--json"]).write_text(json.dumps(report))

    gaps = {"control": 0.02, "patched": 0.01 if holds else 0.03}
    monkeypatch.setattr(engine_check, "vllm_patch", parity)
    found, rows = run("--gpus", "8", "--ways", "this")
    assert found == code
    compared = [(r["value"], r["p90"]) for r in rows if r["measure"] == "parity"]
    assert compared == ([("0.01", "0.02")] if holds else [])
    # What did not hold is compared again; where no time is left nothing is.
    options = "--gpus", "8", "--ways", "this", "--resume"
    assert run(*options)[0] == code
    monkeypatch.setattr(engine_check, "vllm_patch", None)
    assert run(*options, "--minutes", "0")[0] == code


def test_what_compiles_while_serving_is_a_problem(run, processes, capsys):
    _, before = run("--no-check", "--modes", "graphs", "--ways", "this")
    processes.told.clear()
    processes.layers = 2
    assert run("--no-compile") == (0, before), "rows of another run stay"
    (way, spec, variables), _ = processes.told
    assert way == "this" and spec["engine"]["jit_monitor_mode"] == "error"
    assert spec["sweep"][0] == 1 and spec["sweep"][-1] == 16384
    said = f"compiled: {len(engine.SWEEP)} prompts compiled nothing"
    assert said in capsys.readouterr().out
    processes.failing = {"this"}
    assert run("--no-compile")[0] == 1


def test_the_report_and_the_plot(run, capsys, tmp_path):
    run("--no-check", "--modes", "graphs")
    text = capsys.readouterr().out
    assert "decode_ms: refined / this 1.50, least 1.50" in text
    image = tmp_path / "engine.svg"
    options = ["--mode", "graphs"]
    plot_engine.main([str(tmp_path / "engine.csv"), str(image), *options])
    drawn = image.read_text()
    assert 'class="line this"' in drawn and "times as fast as stock" in drawn


def test_a_log_says_why():
    log = (
        "INFO x\nValueError: The output_size = 192\nRuntimeError: Engine core failed\n"
    )
    assert engine_child._reason(log) == "RuntimeError: Engine core failed"
    refused = (
        "WARNING Error: not up\n(EngineCore) Error: failed. See root cause above\n"
    )
    assert engine_child._reason(log + refused) == "RuntimeError: Engine core failed"
    assert engine_child._reason("Killed\n\n") == "Killed"
    assert engine_child._reason("") == "no output"


def test_a_process_that_fails_is_told_by_its_last_error():
    with pytest.raises(engine_child.RowFailed, match="KeyError: 'tp_size'"):
        engine_child.process({"rank": 1}, {})


PROCESS = """
import json, os, subprocess, sys, time
spec = json.load(open(sys.argv[1]))
child = subprocess.Popen(["sleep", "600"])
with open(sys.argv[2], "w") as file:
    for row in ({"measure": "child", "value": child.pid}, {"measure": "total_s"}):
        file.write(json.dumps(row) + chr(10))
        file.flush()
        time.sleep(spec["seconds"])
time.sleep(600)
"""


@pytest.mark.parametrize("seconds", [0, 600], ids=["ends", "hangs"])
def test_rows_are_known_at_once_and_nothing_stays(monkeypatch, tmp_path, seconds):
    (tmp_path / "writes_rows.py").write_text(PROCESS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = []

    def known(row):
        found.append(row)
        if seconds:  # The next look at the clock is the last.
            monkeypatch.setattr(engine_child.time, "monotonic", lambda: float("inf"))

    deadline, given = time.monotonic() + 500, {"seconds": seconds}
    with contextlib.ExitStack() as stack:
        if seconds:
            stack.enter_context(pytest.raises(engine_child.OutOfTime))
        engine_child.process(given, {}, "writes_rows", known, deadline)
    child, *rest = found
    assert [row["measure"] for row in rest] == ([] if seconds else ["total_s"])
    # It is gone, or about to be reaped.
    state = Path(f"/proc/{child['value']}/stat")
    assert not state.is_file() or state.read_text().split()[2] in "ZX"


class Stepped:
    """An engine that prefills ``budget`` tokens a step, and lets others decode."""

    def __init__(self, budget: int):
        self.waiting, self.running, self.budget = [], [], budget
        scheduler = SimpleNamespace(max_num_batched_tokens=budget)
        cache = SimpleNamespace(num_gpu_blocks=1000, block_size=16)
        self.vllm_config = SimpleNamespace(
            scheduler_config=scheduler, cache_config=cache
        )

    def add_request(self, name, prompt, sampling, lora_request):
        self.waiting.append([len(prompt["prompt_token_ids"]), sampling.max_tokens])

    def has_unfinished_requests(self):
        return bool(self.waiting or self.running)

    def step(self):
        got = len(self.running)
        left = self.budget - got
        self.running = [n - 1 for n in self.running if n > 1]
        while self.waiting and left:
            part = min(left, self.waiting[0][0])
            left -= part
            self.waiting[0][0] -= part
            if not self.waiting[0][0]:
                got += 1
                more = self.waiting.pop(0)[1] - 1
                self.running += [more] * (more > 0)
        return [None] * got


@pytest.mark.parametrize(("context", "batch"), [(64, 1), (100, 16), (512, 7)])
def test_steps_are_those_of_whole_batches(context, batch):
    """However many steps their prompts took."""
    llm_engine = Stepped(budget=256)
    stepped = engine_row.Engine(SimpleNamespace(llm_engine=llm_engine), 1000)
    times = iter(range(10**6))
    timed = []

    def step():
        seconds, got = next(times), len(llm_engine.step())
        timed.append((seconds, got))
        return seconds, got

    stepped.step = step
    row = engine_row.decode(stepped, context, batch)
    whole = [seconds for seconds, got in timed if got == batch]
    assert len(whole) >= 1 + engine_row.SKIPPED_STEPS + engine_row.DECODE_STEPS
    assert row["tokens"] == batch and row["context"] == context
    assert 1e3 * whole[0] < row["value"] < 1e3 * whole[-1]
    assert not llm_engine.has_unfinished_requests()


def test_rows_of_another_routing_are_not_resumed(run, processes, monkeypatch, capsys):
    few = ("--no-check", "--modes", "compiled", "--ways", "this", "--resume")
    strategy = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
    assert {row["routing"] for row in run(*few)[1]} == {"router"}
    monkeypatch.setenv(strategy, "normal_routing")
    with pytest.raises(SystemExit):
        run(*few)
    assert "rows whose routing is router, not simulated" in capsys.readouterr().err
    code, rows = run(*few[:-1])
    (_, spec, variables) = processes.told[-1]
    assert not spec["random_routing"] and variables[strategy] == "normal_routing"
    assert {row["routing"] for row in rows} == {"simulated"}


def test_more_than_the_cache_holds_is_left_out():
    llm_engine = Stepped(budget=256)
    stepped = engine_row.Engine(SimpleNamespace(llm_engine=llm_engine), 1000)
    assert engine_row.decode(stepped, 1024, 16) is None
    assert not llm_engine.waiting
