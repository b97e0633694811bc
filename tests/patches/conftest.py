"""The release under test, and a copy of what the patches are made from."""

import shutil
from pathlib import Path

import pytest

from patches.generator import check, generate
from patches.generator.commits import FOLDERS, RELEASES


@pytest.fixture
def release(request) -> str:
    """The release under test, or the newest if that has no series."""
    chosen = request.config.getoption("--vllm")
    return chosen if chosen in RELEASES else RELEASES[-1]


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A copy of the folders that go upstream, which the generator takes instead."""
    copy = tmp_path / "sources"
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(generate.REPOSITORY / folder, copy / folder, ignore=ignored)
    monkeypatch.setattr(generate, "REPOSITORY", copy)
    monkeypatch.setattr(check, "REPOSITORY", copy)
    return copy
