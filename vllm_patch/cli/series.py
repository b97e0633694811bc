# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch series``: the change as commits to vLLM, for ``git am`` and review."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from vllm_patch.cli import UsageError, remove, signals_held
from vllm_patch.series.commits import COMMITS
from vllm_patch.series.diffs import STOCK, changes_of

PLACEHOLDER = "Your Name <you@example.com>"
MAIL = """\
From {zeros} Mon Sep 17 00:00:00 2001
From: {author}
Date: Sat, 1 Jan 2000 00:00:00 +0000
Subject: [PATCH {number}/{total}] {subject}

{body}
Signed-off-by: {author}
---

{diff}"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "series",
        help="write the change as commits for a vLLM release",
        description="Write the commits for a vLLM release, one file each, for `git am "
        "--keep-non-patch` in a checkout of its tag. The same bytes each time.",
        epilog="example: vllm-patch series 0.33.0 DIR --author 'Me <me@example.org>'",
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
    mails = dict(_mails(args.release, args.author))
    try:
        if args.folder.exists() and any(args.folder.iterdir()):
            raise UsageError(f"{args.folder} is not empty. Give a new folder.")
        _write(args.folder, mails)
    except OSError as error:
        raise UsageError(
            f"{error}. Give a folder that can be written; nothing is left in it."
        ) from error
    print(*(args.folder / name for name in mails), sep="\n")
    return 0


def _mails(release: str, author: str) -> Iterator[tuple[str, bytes]]:
    for number, commit in enumerate(COMMITS, 1):
        subject, _, body = commit.message.partition("\n\n")
        words = re.sub(r"[^A-Za-z0-9]+", "-", subject).strip("-")[:52].strip("-")
        mail = MAIL.format(
            zeros="0" * 40,
            author=author,
            number=number,
            total=len(COMMITS),
            subject=subject,
            body=body,
            diff="".join(changes_of(commit, release).values()),
        )
        # Not text, whose lines end as the platform does.
        yield f"{number:04}-{words}.patch", mail.encode()


@signals_held()
def _write(folder: Path, mails: dict[str, bytes]) -> None:
    """Write all files, or none, nor folders for them."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, mail in mails.items():
            (folder / name).write_bytes(mail)
    except BaseException:
        remove((folder / name for name in mails), made)
        raise
