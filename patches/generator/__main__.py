# SPDX-License-Identifier: Apache-2.0
"""``python -m patches.generator``."""

import argparse
import subprocess
import sys
from pathlib import Path

from patches.generator import check
from patches.generator.commits import RELEASES
from patches.generator.generate import GenerateError, write_series
from tests.vllm_tree import fetch

PATCHES = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m patches.generator")
    parser.add_argument("action", choices=["write", "check"])
    parser.add_argument(
        "releases", nargs="*", metavar="RELEASE", help=f"default: {' '.join(RELEASES)}"
    )
    parser.add_argument(
        "--every-commit", action="store_true", help="check: import after each commit"
    )
    parser.add_argument(
        "--run-tests", action="store_true", help="check: run the tests in the patches"
    )
    args = parser.parse_intermixed_args()
    if unknown := set(args.releases) - set(RELEASES):
        parser.error(f"no series for {sorted(unknown)}; there are {list(RELEASES)}")
    try:
        for release in args.releases or RELEASES:
            if args.action == "write":
                target = PATCHES / f"v{release}"
                names = write_series(release, fetch(release), target)
                print(f"{target.relative_to(PATCHES.parent)}: {len(names)} patches")
            else:
                check.check(release, PATCHES, args.every_commit, args.run_tests)
    except (GenerateError, check.CheckError) as error:
        print(f"vLLM {release}: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"vLLM {release}: {error}\n{error.stderr}", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
