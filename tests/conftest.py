"""Chooses the vLLM release that the tests import: ``pytest --vllm 0.28.0``."""

import os
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow, not wrong.
settings.register_profile(
    "busy", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy")

NEWEST = "0.33.0"
INSTALLED = "installed"


def pytest_addoption(parser):
    parser.addoption(
        "--vllm",
        default=NEWEST,
        metavar="RELEASE",
        help=f"vLLM release to test on the CPU (default {NEWEST}), or 'installed' "
        "for tests/engine, which start the installed one in processes of their own, "
        "and tests/patches, which import none",
    )
    parser.addoption(
        "--skips",
        metavar="FILE",
        help="add a line to FILE for each reason why tests were skipped",
    )


def pytest_configure(config):
    release = config.getoption("--vllm")
    if release == INSTALLED:
        return
    from tests.vllm_tree import fetch

    tree = str(fetch(release))
    if runs_tests(config):
        _prepare(tree)


def runs_tests(config) -> bool:
    """Whether this process runs tests; with ``-n``, the first one only waits."""
    return hasattr(config, "workerinput") or not config.getoption("numprocesses", 0)


def _prepare(tree: str) -> None:
    """Make this process, which runs tests, import the release in ``tree``."""
    from tests.vllm_on_cpu import install

    sys.path.insert(0, tree)
    # For tests that start Python themselves.
    paths = [tree, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    install()


def pytest_report_header(config):
    return f"vLLM: {config.getoption('--vllm')}"


def pytest_terminal_summary(terminalreporter, config):
    """Note what was skipped, in the process that hears of all tests."""
    file = config.getoption("--skips")
    if not file or hasattr(config, "workerinput"):
        return
    reasons = Counter(
        (os.path.relpath(path, config.rootpath), reason.removeprefix("Skipped: "))
        for path, _line, reason in (
            report.longrepr for report in terminalreporter.stats.get("skipped", [])
        )
    )
    with open(file, "a") as sink:
        for (path, reason), count in reasons.items():
            print(
                f"vLLM {config.getoption('--vllm')}, {path}: {count}, {reason}",
                file=sink,
            )


@pytest.fixture
def release(request) -> str:
    """The release under test, or the newest if that has no series."""
    from vllm_patch.series.diffs import STOCK

    chosen = request.config.getoption("--vllm")
    return chosen if chosen in STOCK else [*STOCK][-1]


@pytest.fixture
def plugin():
    """The plugin, registered for the length of a test."""
    from vllm_patch import plugin

    plugin.register()
    yield plugin
    plugin.unregister()


@pytest.fixture
def padding_log(caplog):
    """Return what the padded layers logged so far, as a function of no arguments."""
    import logging

    from vllm_patch.fp8_tp_padding.methods import engagement

    name = "vllm.fp8_tp_padding"
    engagement.report(tp_rank=1)  # Forgets layers that other tests built.
    caplog.set_level(logging.INFO, name)
    return lambda: [record for record in caplog.records if record.name == name]
