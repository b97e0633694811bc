# SPDX-License-Identifier: Apache-2.0
"""How far two runs over the same prompts are apart, and whether that is noise."""

import math
from dataclasses import dataclass

# Parity: how many times as far from the baseline as the control patched may be, in the
# mean and at most. Nine pairs of runs (eight models, on CPUs and GPUs) came to 0.77 to
# 1.15 and 0.85 to 1.33 times; a wrong scale makes the mean 20 times the control's.
FACTORS = 1.5, 2.0
# Nats more, for a control near 0: a fourth and half of the smallest of those controls.
SLACK = 0.001, 0.01
# And for one at the baseline's TP. It lacks the noise of another, which was 0.004 to
# 0.02 in the mean: it can confirm parity, with luck, but not deny it.
SAME_TP_SLACK = 0.005, 0.05
# Means from here on are not noise: a wrong scale (padding at the tail only) makes 0.13.
NOISE_LIMIT = 0.1


@dataclass(frozen=True)
class Difference:
    """Distance of a run from the baseline over all prompt positions.

    Attributes:
        mean: Mean absolute difference of the log-probabilities, nats.
        max: Largest absolute difference, nats.
        top1: Share of positions with the same most likely token, 0 to 1.
        positions: Positions compared.

    """

    mean: float
    max: float
    top1: float
    positions: int

    @property
    def is_noise(self) -> bool:
        """Whether it is small enough to be noise at all."""
        return self.mean <= NOISE_LIMIT

    def within(self, limits: tuple[float, float]) -> bool:
        """Whether neither mean nor max is beyond ``limits``."""
        return self.mean <= limits[0] and self.max <= limits[1]


def difference(baseline: dict, other: dict) -> Difference:
    """Compare two ``engine_run`` results; a NaN counts as infinitely far."""
    pairs = zip(baseline["logprobs"], other["logprobs"], strict=True)
    gaps = [math.inf if math.isnan(a - b) else abs(a - b) for a, b in pairs]
    tops = zip(baseline["top_tokens"], other["top_tokens"], strict=True)
    count, same = len(gaps), sum(a == b for a, b in tops)
    return Difference(sum(gaps) / count, max(gaps), same / count, count)


def limits(control: Difference, is_same_tp: bool = False) -> tuple[float, float]:
    """Return the largest mean and max difference that count as noise, nats."""
    slack = SAME_TP_SLACK if is_same_tp else SLACK
    return FACTORS[0] * control.mean + slack[0], FACTORS[1] * control.max + slack[1]
