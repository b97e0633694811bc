# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-patch`` command: one module for each thing it does."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ENDING_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class UsageError(Exception):
    """Bad input; the message holds the value, the rule and the remedy."""


@contextmanager
def signals_held() -> Iterator[None]:
    """Let signals that end this process wait until a few files are all written."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def remove(files: Iterable[Path], folders: set[Path]) -> None:
    """Remove files that are there, and folders that hold nothing."""
    for file in files:
        with suppress(OSError):
            file.unlink()
    for folder in sorted(folders, reverse=True):
        with suppress(OSError):
            folder.rmdir()
