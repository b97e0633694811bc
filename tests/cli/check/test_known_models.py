"""That the table of known models is what ``check`` says today."""

import itertools
import json
from pathlib import Path

import pytest

from vllm_patch.cli.check import command
from vllm_patch.cli.check.verdict import chosen
from vllm_patch.cli.main import main

from . import known_models
from .known_models import TABLE, verdict

README = Path(__file__).parents[3] / "README.md"


def test_the_table_is_up_to_date():
    """``make tables`` writes it."""
    assert TABLE.read_text() == known_models.table()
    assert len(TABLE.read_text().splitlines()) <= 16


def test_the_readme_shows_it():
    heading, rule, *rows = known_models.table().splitlines()
    readme = README.read_text().splitlines()
    assert heading in readme
    start = readme.index(heading)
    assert readme[start : start + 2 + len(rows)] == [heading, rule, *rows]


def test_the_example_of_the_readme(tmp_path, monkeypatch, capsys):
    """Its lines are those that the command prints, in this order."""
    monkeypatch.setattr(command, "_installed", lambda: "0.33.0")
    lines = iter(README.read_text().splitlines())
    asked = next(line for line in lines if line.startswith("    $ vllm-patch check "))
    shown = itertools.takewhile(lambda line: line.startswith("    ") or not line, lines)
    shown = [line for line in shown if line.strip()]
    *_, model, option, tp = asked.split()
    assert "config.json" in model or "Qwen3-235B-A22B" in model
    file = tmp_path / "config.json"
    file.write_text(json.dumps(known_models.config("Qwen3-235B-A22B")))
    monkeypatch.chdir(tmp_path)
    main(["check", file.name, option, tp])
    printed = iter(capsys.readouterr().out.splitlines())
    assert shown
    for line in shown:
        assert line[4:] in printed


@pytest.mark.parametrize(
    ("name", "tp", "stock", "ours"),
    [
        # Facts that the README and its benchmarks have: GB of experts in 94 layers.
        ("Qwen3-235B-A22B", 8, 28.4, 28.4),
        ("Qwen3-235B-A22B", 4, 56.8, 56.8),
    ],
)
def test_bytes_of_experts(name, tp, stock, ours):
    found = verdict(name, tp)
    (experts,) = (row for row in found.rows if row.layer.kind == "experts")
    assert round(experts.bytes(0, "real") / 1e9, 1) == ours
    assert round(experts.bytes(0, "stock") / 1e9, 1) == pytest.approx(stock, abs=0.05)


def test_the_size_to_choose():
    """Compact experts cost nothing; padded shared experts of 64 columns do."""
    sizes = [verdict("Qwen3-235B-A22B", tp) for tp in (1, 2, 4, 8, 16)]
    assert chosen(sizes).setting.tp == 8
    assert chosen(sizes[3:4]).setting.tp == 8
    assert chosen(sizes[4:]) is None
