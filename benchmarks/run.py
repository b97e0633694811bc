"""What the benchmarks share: options, rows, problems, bars and the exit status."""

import argparse
import csv
import datetime
import importlib.metadata
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from benchmarks import checkpoint as checkpoints
from benchmarks.checkpoint import Checkpoint
from vllm_patch import plugin


class Rows:
    """A CSV file whose rows are on disk as soon as they are known.

    Args:
        file: It.
        common: Columns that are the same for all rows.
        header: What the file has as its header already.

    """

    def __init__(
        self, file: TextIO, common: dict[str, str], header: list[str] | None = None
    ):
        self.file = file
        self.common = common
        self.writer = csv.DictWriter(file, header) if header else None

    def add(self, row: dict[str, object]) -> None:
        row = {**row, **self.common}
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, list(row))
            self.writer.writeheader()
        self.writer.writerow(row)
        self.file.flush()


@dataclass
class Run:
    """What a command was asked to do, and what it found."""

    device: torch.device
    tokens: Sequence[int]
    rows: Rows
    checkpoint: Checkpoint = checkpoints.FP8
    deadline: float = float("inf")
    checked: int = 0
    missed: int = 0
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        print(f"  PROBLEM: {text}", flush=True)
        self.problems.append(text)

    def start(self, budget: float) -> None:
        self.deadline = time.monotonic() + budget

    def is_late_for(self, what: str) -> bool:
        """Whether the budget is spent; if so, what is left out is a problem."""
        late = time.monotonic() > self.deadline
        if late:
            self.problem(f"{what}: not run, the budget is spent")
        return late

    def bar(
        self, what: str, found: dict[str, float], limit: float, most: bool = False
    ) -> None:
        """Say whether the worst of what was found keeps to a limit.

        Args:
            what: The ratio.
            found: Values, by where they were found.
            limit: The least that they shall be.
            most: It is the most instead.

        """
        if not found:
            return
        where = (max if most else min)(found, key=found.get)
        value, sign = found[where], "<=" if most else ">="
        met = value <= limit if most else value >= limit
        self.missed += not met
        verdict = "PASS" if met else "MISS"
        print(f"  {verdict} {what}: {value:.2f} {sign} {limit:g} ({where})", flush=True)

    def exit_status(self) -> int:
        """Print what it comes to; return 1 with problems, or where nothing was checked.

        A bar that is missed does not count: times are of a machine, and vary.
        """
        print(
            f"\n{self.checked} layers checked, {len(self.problems)} problems, "
            f"{self.missed} bars missed"
        )
        print(*self.problems, sep="\n")
        return 1 if self.problems or not self.checked else 0


def parser_of(name: str, text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parsed(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> argparse.Namespace:
    """Return the parser's options and those of all benchmarks."""
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--cases", nargs="+", default=[""], help="only cases whose name contains one")
    add("--tokens", nargs="+", type=int)
    add("--check-only", action="store_true", help="correctness, no timing")
    add("--device", type=torch.device, default=cuda)
    add(
        "--config",
        type=Checkpoint.of,
        default=checkpoints.FP8,
        metavar="CONFIG",
        help="config.json of the checkpoint's format (default: plain FP8)",
    )
    add("--csv", help="file for the rows")
    add("--commit", help="commit that is measured, where git cannot tell")
    args = parser.parse_args(argv)
    if not args.check_only and args.device.type == "cpu":
        parser.error("timing needs a CUDA GPU, and vLLM's build for it")
    return args


def chosen(cases: Sequence, args: argparse.Namespace) -> list:
    return [case for case in cases if any(text in case.name for text in args.cases)]


def environment(commit: str | None) -> dict[str, str]:
    """Return GPU, versions, date, commit and command, as columns of a CSV."""
    import vllm

    command = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "date": datetime.date.today().isoformat(),
        "commit": commit or _commit(),
        "command": shlex.join(command),
    }


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


@contextmanager
def started(args: argparse.Namespace, bounds: str) -> Iterator[Rows]:
    """Register the plugin, say what runs where, and open the file of rows."""
    plugin.register()
    where = environment(args.commit)
    for name, value in {**where, "bounds": bounds}.items():
        print(f"{name:8} {value}")
    with open(args.csv or os.devnull, "w", newline="") as file:
        yield Rows(file, where)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
