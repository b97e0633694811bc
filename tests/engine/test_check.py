"""That ``vllm-patch check`` says what the real engine does; `grid.py` has more."""

from . import grid
from .grid import Cell


def test_the_engine_does_what_check_says(tmp_path):
    """A dense MLP of 19 blocks, so 1216 on a rank, and experts of 384 / 2 = 192."""
    changes = {"moe_intermediate_size": 384, "intermediate_size": 2432}
    changes["mlp_only_layers"] = [0]
    cell = Cell("qwen3_moe_1536", 2, changes, layers=2)
    said = grid.verdict(cell, tmp_path / "checkpoint")
    assert said.code == 1
    grid.compare(said, tmp_path)
