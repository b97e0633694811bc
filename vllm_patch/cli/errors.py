# SPDX-License-Identifier: Apache-2.0
"""Errors that are the caller's to mend."""


class UsageError(Exception):
    """Bad input; the message holds the value, the rule and the remedy."""
