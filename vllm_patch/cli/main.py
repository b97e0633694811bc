# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``vllm-patch``."""

import argparse
import os
import signal
import sys
import traceback

from vllm_patch import __version__
from vllm_patch.cli import (
    UsageError,
    apply,
    check,
    collect_env,
    parity,
    series,
    status,
    tune,
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-patch",
        description="Installed beside vLLM, this package lets it load block-quantized "
        "FP8 models at tensor-parallel sizes that cut a quant block, such as "
        "Qwen3-235B-A22B-FP8 at -tp 8, by itself. The commands look whether it does, "
        "compare its answers with stock vLLM's, tune its kernels for a model, and put "
        "the change into vLLM's source.",
        epilog="start with: vllm-patch check MODEL -tp 8",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command")
    for module in (check, parity, tune, status, collect_env, apply, series):
        module.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    # As Ctrl-C does: what runs is ended, what is temporary is removed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup ignores the latter.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Such as `head`, which has read enough; the interpreter would flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UsageError, OSError) as error:
        print(f"vllm-patch {args.command}: {error}", file=sys.stderr)
        return 2
    except Exception:
        # Python's own exit code would be 1, which says "no parity".
        traceback.print_exc()
        return 2
    except KeyboardInterrupt:
        print(f"vllm-patch {args.command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
