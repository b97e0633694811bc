# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch series``: the change as commits to vLLM, for ``git am`` and review."""

import argparse
import re
from pathlib import Path

from vllm_patch.cli.errors import UsageError
from vllm_patch.series.diffs import STOCK
from vllm_patch.series.mails import write_series

PLACEHOLDER = "Your Name <you@example.com>"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "series",
        help="write the change as commits for a vLLM release",
        description="Write the commits for a vLLM release, one file each, for `git am "
        "--keep-non-patch` in a checkout of its tag. The same bytes each time.",
    )
    parser.add_argument(
        "release", choices=STOCK, metavar="RELEASE", help=", ".join(STOCK)
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="new, or empty")
    parser.add_argument(
        "--author",
        default=PLACEHOLDER,
        metavar="'NAME <MAIL>'",
        help="who the commits are from and who signs them off (DCO). Default: "
        f"{PLACEHOLDER}, which git takes; a pull request needs a person",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the series; return 0.

    Raises:
        UsageError: The folder holds something, or cannot be written; or the author is
            no name and address.

    """
    if not re.fullmatch(r"[^<>\n]*[^<>\s] <[^<>\s]+@[^<>\s]+>", args.author):
        raise UsageError(f"--author {args.author!r} must be 'Name <mail@host>'.")
    try:
        if args.folder.exists() and any(args.folder.iterdir()):
            raise UsageError(f"{args.folder} is not empty. Give a new folder.")
        names = write_series(args.release, args.folder, args.author)
    except OSError as error:
        raise UsageError(f"{error}. Give a folder that can be written.") from error
    for name in names:
        print(args.folder / name)
    return 0
