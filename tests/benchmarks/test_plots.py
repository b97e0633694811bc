"""The drawings of the rows that are in the repository."""

from pathlib import Path

import pytest

from benchmarks import plot_engine, plot_moe

RESULTS = Path(plot_moe.__file__).parent / "results"


@pytest.mark.parametrize(
    ("command", "name", "options"),
    [
        (plot_moe.main, "moe_h200", []),
        (plot_engine.main, "engine_h200_compiled", []),
    ],
)
def test_the_image_is_of_the_rows(tmp_path, command, name, options):
    drawn = tmp_path / "drawn.svg"
    assert command([str(RESULTS / f"{name}.csv"), str(drawn), *options]) == 0
    assert drawn.read_text() == (RESULTS / f"{name}.svg").read_text()
