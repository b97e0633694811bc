"""When two runs count as the same."""

import math

import pytest

from vllm_patch.cli import comparison
from vllm_patch.cli.comparison import Difference


def scores(logprobs, top_tokens=None):
    return {"logprobs": logprobs, "top_tokens": top_tokens or [1] * len(logprobs)}


def test_difference_over_all_positions():
    gap = comparison.difference(
        scores([-1.0, -2.0, -3.0, -4.0], [1, 2, 3, 4]),
        scores([-1.0, -2.5, -2.0, -4.0], [1, 2, 3, 5]),
    )
    assert gap == Difference(mean=0.375, max=1.0, top1=0.75, positions=4)


def test_nan_is_infinitely_far():
    gap = comparison.difference(scores([-1.0, -2.0]), scores([-1.0, math.nan]))
    assert gap.max == math.inf
    assert not comparison.is_noise(gap)
    assert not comparison.holds(gap, CONTROL)


def test_runs_of_other_lengths_are_not_compared():
    with pytest.raises(ValueError):
        comparison.difference(scores([-1.0]), scores([-1.0, -2.0]))


CONTROL = Difference(mean=0.02, max=0.5, top1=0.96, positions=760)


@pytest.mark.parametrize(
    ("mean", "most", "parity"),
    [
        (0.02, 0.5, True),
        (0.0349, 1.049, True),  # just inside 1.5 x 0.02 + 0.005 and 2 x 0.5 + 0.05
        (0.0351, 0.5, False),
        (0.02, 1.051, False),
        (math.inf, math.inf, False),
    ],
)
def test_parity_is_within_the_controls_noise(mean, most, parity):
    patched = Difference(mean=mean, max=most, top1=1.0, positions=760)
    assert comparison.holds(patched, CONTROL) is parity
