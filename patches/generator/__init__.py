# SPDX-License-Identifier: Apache-2.0
"""Writes ``patches/vX.Y.Z/`` from the package, its tests and a hook per family.

python -m patches.generator write [RELEASE...]    make patches
python -m patches.generator check [RELEASE...]    make check-patches

commits.py    the series: which file goes upstream in which commit, and why
hooks/        FIRST-LAST/COMMIT.diff: what a commit changes in vLLM's own files,
              in the releases FIRST to LAST
generate.py   a release's tree, the commits, git format-patch
check.py      same bytes; git am; imports; vllm-patch apply; the patches' own tests
"""
