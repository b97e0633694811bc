# SPDX-License-Identifier: Apache-2.0
"""How far two runs over the same prompts are apart, and whether that is noise."""

import math
from dataclasses import dataclass

# Parity: the patched run may be this much farther from the baseline than the
# control, which is stock vLLM at another tensor-parallel size. Factor, nats.
MEAN_LIMIT = (1.5, 0.005)
MAX_LIMIT = (2.0, 0.05)
# A control this far from the baseline, mean in nats, is not noise: a wrong scale
# (padding at the tail only) shows as 0.2.
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


def difference(baseline: dict, other: dict) -> Difference:
    """Compare two ``engine_run`` results; a NaN counts as infinitely far."""
    pairs = zip(baseline["logprobs"], other["logprobs"], strict=True)
    gaps = [abs(a - b) for a, b in pairs]
    gaps = [math.inf if math.isnan(gap) else gap for gap in gaps]
    same = [
        a == b for a, b in zip(baseline["top_tokens"], other["top_tokens"], strict=True)
    ]
    return Difference(
        mean=sum(gaps) / len(gaps),
        max=max(gaps),
        top1=sum(same) / len(same),
        positions=len(gaps),
    )


def limits(control: Difference) -> tuple[float, float]:
    """Return the largest mean and max difference that count as noise, nats."""
    mean_factor, mean_slack = MEAN_LIMIT
    max_factor, max_slack = MAX_LIMIT
    return (
        mean_factor * control.mean + mean_slack,
        max_factor * control.max + max_slack,
    )


def is_noise(control: Difference) -> bool:
    """Whether the control is close enough to the baseline to judge by."""
    return control.mean <= NOISE_LIMIT


def holds(patched: Difference, control: Difference) -> bool:
    """Whether the patched run is as close to the baseline as noise allows."""
    mean_limit, max_limit = limits(control)
    return patched.mean <= mean_limit and patched.max <= max_limit
