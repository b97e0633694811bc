"""The release under test."""

import pytest

from vllm_patch.series.diffs import STOCK


@pytest.fixture
def release(request) -> str:
    """The release under test, or the newest if that has no series."""
    chosen = request.config.getoption("--vllm")
    return chosen if chosen in STOCK else [*STOCK][-1]
