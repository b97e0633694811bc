"""That ``vllm-patch check`` says what the real engine does; `grid.py` has more."""

import pytest

from . import grid
from .grid import Cell


@pytest.mark.parametrize(
    "cell",
    [
        # Experts of 384 / 2 = 192; a dense MLP of 19 blocks, so 1216 on a rank.
        Cell("qwen3_moe_1536", 2, {"moe_intermediate_size": 384}),
        Cell("qwen3_2432", 2),
    ],
    ids=str,
)
def test_the_engine_does_what_check_says(tmp_path, cell):
    assert grid.compare(cell, tmp_path).code == 1
