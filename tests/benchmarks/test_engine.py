"""The engine's benchmark, with processes that answer at once."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import communication, engine, engine_row, plot_engine
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
    """What stands for processes of ``engine_row``: they note what they are told."""

    def __init__(self):
        self.told = []
        self.failing: set[str] = set()
        self.layers = 94
        self.logits = {"this": 1.001, "padded": 1.0, "refined": 1.01}

    def __call__(self, spec, variables):
        given = {**variables, **spec["engine"], "tp_size": spec["tp_size"]}
        ways = {
            name: {
                **{**each.environment, **each.engine},
                "tp_size": MODEL.tp_size // (1 + each.halves),
            }
            for name, each in engine.WAYS.items()
        }
        # Expert parallelism is stock with one argument more.
        fitting = [name for name, said in ways.items() if said.items() <= given.items()]
        way = max(fitting, key=lambda name: len(ways[name]))
        self.told.append((way, spec, variables))
        if way in self.failing:
            raise engine.RowFailed("ValueError: refused")
        if "logits" in spec:
            torch.save(torch.full((2, 8), self.logits[way]), spec["logits"])
            return {"rows": []}
        config = json.loads(Path(spec["engine"]["model"], "config.json").read_text())
        assert config["num_hidden_layers"] == self.layers
        factor = 1 if way == "this" else 1.5
        rows = [
            {"measure": "decode_ms", "tokens": n, "context": 1024, "value": factor * n}
            for n in (1, 16)
        ]
        rows.append({"measure": "prefill_ms", "tokens": 512, "value": 7 * factor})
        return {"experts": "Triton 192", "rows": rows}


@pytest.fixture
def processes(monkeypatch):
    found = Processes()
    monkeypatch.setattr(engine, "process", found)
    monkeypatch.setattr(engine, "_write_small", lambda model, folder: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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
        assert variables["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] == "uniform_random"
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
    processes.logits["this"] = 1 + 2 * engine.TOLERATED
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
    assert after[: len(before)] == before and len(after) == len(before) + 4 * 3


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
    assert engine._reason(log) == "RuntimeError: Engine core failed"
    assert engine._reason("Killed\n\n") == "Killed"
    assert engine._reason("") == "no output"


def test_a_process_that_fails_is_told_by_its_last_error():
    with pytest.raises(engine.RowFailed, match="KeyError: 'tp_size'"):
        engine.process({"rank": 1}, {})


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


def test_more_than_the_cache_holds_is_left_out():
    llm_engine = Stepped(budget=256)
    stepped = engine_row.Engine(SimpleNamespace(llm_engine=llm_engine), 1000)
    assert engine_row.decode(stepped, 1024, 16) is None
    assert not llm_engine.waiting
