"""What is skipped is told at the end of ``make test``."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
TESTS = """
import pytest

@pytest.mark.skipif(True, reason="no moon")
@pytest.mark.parametrize("n", range(3))
def test_tides(n):
    pass

def test_asks():
    pytest.skip("no sun")

def test_fails():
    assert False
"""


def skipped(file: Path, *arguments: str) -> list[str]:
    folder = file.parent
    (folder / "test_sky.py").write_text(TESTS)
    (folder / "conftest.py").write_text("from tests.conftest import *\n")
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(folder)]
    command += ["--vllm", "installed", "--skips", str(file), *arguments, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert "1 failed, 4 skipped" in done.stdout, done.stdout + done.stderr
    return sorted(file.read_text().splitlines())


def test_each_reason_is_noted_once_with_its_count(tmp_path):
    lines = ["vLLM installed, test_sky.py: 1, no sun"]
    lines += ["vLLM installed, test_sky.py: 3, no moon"]
    file = tmp_path / "skips"
    assert skipped(file) == lines
    # Workers tell the process that started them; a second run adds to the file.
    assert skipped(file, "-n", "2") == sorted(lines * 2)
