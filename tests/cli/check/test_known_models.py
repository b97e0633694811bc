"""That the table of known models is what ``check`` says today."""

from pathlib import Path

import pytest

from vllm_patch.cli.check.verdict import chosen

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
