"""That the table of known models is what ``check`` says today."""

import json
from pathlib import Path

import pytest

from benchmarks.engine_models import MODELS
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


def test_the_readme_shows_what_check_prints(tmp_path, capsys):
    """Not all of it, but line by line."""
    command = "    $ vllm-patch check config.json -tp 8"
    _, _, block = README.read_text().partition(command)
    shown = [line[4:] for line in block.partition("\n\n")[0].splitlines()[1:]]
    (model,) = [model for model in MODELS if model.name == "Qwen3-235B-TP8"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model.config()))
    assert main(["check", str(path), "-tp", "8", "--vllm-version", "0.33.0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(shown) > 5 and [line for line in printed if line in shown] == shown
