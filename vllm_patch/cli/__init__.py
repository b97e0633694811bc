# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-patch`` command: one module for each thing it does."""

import signal

ENDING_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class UsageError(Exception):
    """Bad input; the message holds the value, the rule and the remedy."""
