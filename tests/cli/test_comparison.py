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
    assert not gap.is_noise
    assert not gap.within(comparison.limits(CONTROL))


def test_runs_of_other_lengths_are_not_compared():
    with pytest.raises(ValueError):
        comparison.difference(scores([-1.0]), scores([-1.0, -2.0]))


CONTROL = Difference(mean=0.02, max=0.5, top1=0.96, positions=760)


@pytest.mark.parametrize(
    ("mean", "most", "parity"),
    [
        (0.02, 0.5, True),
        (0.0309, 1.009, True),  # just inside 1.5 x 0.02 + 0.001 and 2 x 0.5 + 0.01
        (0.0311, 0.5, False),
        (0.02, 1.011, False),
        (math.inf, math.inf, False),
    ],
)
def test_parity_is_within_the_controls_noise(mean, most, parity):
    patched = Difference(mean=mean, max=most, top1=1.0, positions=760)
    assert patched.within(comparison.limits(CONTROL)) is parity


@pytest.mark.parametrize(
    ("control", "patched"),
    [
        # tests/models/README.md: mean and max of each pair on CPUs, then on GPUs.
        ((0.0079, 0.292), (0.0061, 0.291)),
        ((0.0048, 0.156), (0.0055, 0.179)),
        ((0.0045, 0.020), (0.0047, 0.019)),
        ((0.0064, 0.268), (0.0058, 0.229)),
        ((0.0041, 0.018), (0.0045, 0.024)),
        ((0.0060, 0.211), (0.0061, 0.210)),
        ((0.0048, 0.018), (0.0044, 0.017)),
        ((0.0192, 0.257), (0.0196, 0.282)),
        ((0.0195, 0.275), (0.0199, 0.292)),
    ],
)
def test_what_was_measured_is_parity_and_twice_that_is_not(control, patched):
    limits = comparison.limits(Difference(*control, top1=1.0, positions=760))
    mean, most = patched
    assert Difference(mean, most, 1.0, 760).within(limits)
    assert not Difference(2.4 * mean, most, 1.0, 760).within(limits)
