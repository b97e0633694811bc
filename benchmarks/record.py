"""Says with each number where it was measured, and writes rows as they come."""

import csv
import datetime
import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import torch

ROOT = Path(__file__).resolve().parent.parent


def environment(commit: str | None) -> dict[str, str]:
    """Return GPU, versions, date, commit and command, as columns of a CSV."""
    import vllm

    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "date": datetime.date.today().isoformat(),
        "commit": commit or _commit(),
        "command": shlex.join(["python", "-m", *_module(), *sys.argv[1:]]),
    }


def _module() -> list[str]:
    return [f"benchmarks.{Path(sys.argv[0]).stem}"]


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.check_output(
            git, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Rows:
    """A CSV file whose rows are on disk as soon as they are known."""

    def __init__(self, file: TextIO | None, common: dict[str, str]):
        self.file = file
        self.common = common
        self.writer: csv.DictWriter | None = None

    def add(self, row: dict[str, object]) -> None:
        if self.file is None:
            return
        row = {**row, **self.common}
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, list(row))
            self.writer.writeheader()
        self.writer.writerow(row)
        self.file.flush()
