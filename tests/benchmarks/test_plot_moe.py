"""The drawing of the rows that are in the repository."""

from pathlib import Path

from benchmarks import plot_moe

RESULTS = Path(plot_moe.__file__).parent / "results"


def test_the_image_is_of_the_rows(tmp_path):
    drawn = tmp_path / "drawn.svg"
    assert plot_moe.main([str(RESULTS / "moe_h200.csv"), str(drawn)]) == 0
    assert drawn.read_text() == (RESULTS / "moe_h200.svg").read_text()
