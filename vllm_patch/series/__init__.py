# SPDX-License-Identifier: Apache-2.0
"""The change as commits to vLLM, made of this package's own files.

commits.py  which file goes upstream in which commit
messages/   what the commits say
hooks/      FIRST-LAST/COMMIT.diff: what a commit changes in vLLM's own files, in the
            releases FIRST to LAST; stock.json: these files' git blobs, by release
diffs.py    a commit's changes, by file
tests/      in the installed package: tests/fp8_tp_padding/ of the repository
"""
