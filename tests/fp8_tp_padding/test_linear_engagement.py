"""What is said about padded linear layers."""

import torch

from .test_linear_loading import HIDDEN, load, matrix, merged, run


def test_one_line_says_what_was_padded(padding_log):
    layers = [merged(8, 0, [512, 512]) for _ in range(2)]
    for layer in layers:
        load(layer, {i: matrix(512, HIDDEN, seed=i) for i in (0, 1)})
        run(layer, torch.zeros(1, HIDDEN).bfloat16(), 8, 0)
    (line,) = padding_log()
    assert "2 layer layers, 512 / TP 8 = 64 padded to 128; 0.1 MiB" in line.getMessage()
