"""A disk that takes no more, as a limit on the size of files: nothing half-written."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_apply import copy_of_release, snapshot
from tests.cli.test_model_config import QWEN3_MOE

FULL = "File too large"


def ran(limit: int, *arguments) -> subprocess.CompletedProcess:
    """Run ``vllm-patch`` where no file gets larger than ``limit`` bytes."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_patch", *map(str, arguments)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("limit", [0, 20_000], ids=["at once", "at a larger file"])
def test_apply(tmp_path, release, limit):
    tree = copy_of_release(release, tmp_path / "vllm-src")
    before = snapshot(tree)
    done = ran(limit, "apply", tree)
    assert done.returncode == 2
    assert FULL in done.stderr and f"{tree} is as it was before." in done.stderr
    assert snapshot(tree) == before


@pytest.mark.parametrize("limit", [0, 20_000], ids=["at once", "in the first file"])
def test_series(tmp_path, release, limit):
    done = ran(limit, "series", release, tmp_path / "a" / "series")
    assert done.returncode == 2
    assert FULL in done.stderr and "Give a folder that can be written" in done.stderr
    assert not [*tmp_path.iterdir()]


def test_the_checkpoint_of_parity(tmp_path, monkeypatch):
    """Before any engine starts: it says so, and its folder is gone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"parity": True}))
    options = ["--config", QWEN3_MOE, "--layers", "1", "--tp", "8", "--json", result]
    done = ran(100_000, "parity", *options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("vllm-patch parity: ")
    assert "writing a synthetic checkpoint" in done.stderr
    assert not [*tmp_path.glob("vllm-patch-parity-*")]
    assert not result.exists(), "an earlier result, or a part of one, is none"


def test_no_other_limit(tmp_path, release):
    """What the tests above ask for is written where there is room."""
    assert ran(resource.RLIM_INFINITY, "series", release, tmp_path).returncode == 0
    assert len([*Path(tmp_path).iterdir()]) == 3
