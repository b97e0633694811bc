"""The formats that the release under test has, with the plugin on."""

import pytest

from .configs import FORMATS


def pytest_generate_tests(metafunc):
    """Give each test the formats whose layers it is about."""
    for name, wanted in (("of_experts", "cut_experts"), ("of_linear", "cut_linear")):
        if name in metafunc.fixturenames:
            names = [n for n, each in FORMATS.items() if getattr(each, wanted)]
            metafunc.parametrize(name, names, indirect=True)


def _format(request):
    checkpoint_format = FORMATS[request.param]
    if not checkpoint_format.is_in_release:
        pytest.skip(f"this release has no {request.param} in FP8 blocks")
    return checkpoint_format


@pytest.fixture
def of_experts(request, plugin):
    return _format(request)


@pytest.fixture
def of_linear(request, plugin):
    return _format(request)
