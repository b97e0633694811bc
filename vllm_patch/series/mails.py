# SPDX-License-Identifier: Apache-2.0
"""The series of a release as mails, with bytes that do not move."""

import re
from pathlib import Path

from vllm_patch.series.commits import COMMITS, Commit
from vllm_patch.series.diffs import changes_of

MAIL = """\
From {zeros} Mon Sep 17 00:00:00 2001
From: {author}
Date: Sat, 1 Jan 2000 00:00:00 +0000
Subject: [PATCH {number}/{total}] {subject}

{body}
Signed-off-by: {author}
---

{diff}"""


def write_series(release: str, target: Path, author: str) -> list[str]:
    """Write a release's commits to a folder, one file each; return their names.

    Args:
        release: A release of ``diffs.STOCK``.
        target: Folder, made if need be.
        author: ``Name <mail>``, who signs off, too.

    """
    target.mkdir(parents=True, exist_ok=True)
    names = []
    for number, commit in enumerate(COMMITS, 1):
        names.append(_name(number, commit))
        mail = _mail(number, commit, release, author)
        # Not write_text(), which ends lines as the platform does.
        (target / names[-1]).write_bytes(mail.encode())
    return names


def _name(number: int, commit: Commit) -> str:
    subject = commit.message.splitlines()[0]
    words = re.sub(r"[^A-Za-z0-9]+", "-", subject).strip("-")
    return f"{number:04}-{words[:52].strip('-')}.patch"


def _mail(number: int, commit: Commit, release: str, author: str) -> str:
    subject, _, body = commit.message.partition("\n\n")
    return MAIL.format(
        zeros="0" * 40,
        author=author,
        number=number,
        total=len(COMMITS),
        subject=subject,
        body=body,
        diff="".join(changes_of(commit, release).values()),
    )
