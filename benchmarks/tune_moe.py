"""Tunes the masked kernels for all cases, and other columns of a rank, on this GPU.

    python -m benchmarks.tune_moe [--cases Qwen3-Next columns-48] [--tokens 1 64]

It does what ``vllm-patch tune`` does for a model, and writes the files that come with
the package.
"""

import argparse
from pathlib import Path

from benchmarks.moe_cases import CASES
from vllm_patch.cli.tune.cases import Case
from vllm_patch.cli.tune.command import TOKENS, tune
from vllm_patch.fp8_tp_padding.kernels.tuned_tiles import CONFIGS

# Of 128 experts, top-8, at TP 8. Of the ranks of 192 columns, which a case has, some
# start with a whole block and others with half of one.
COLUMNS = 48, 96, 160, 224, 320, 352


def named() -> dict[str, Case]:
    """Return all by name, each number of experts and columns once: a file is theirs."""
    found = {
        case.name: Case(case.experts, case.top_k, case.hidden, case.total, case.tp_size)
        for case in CASES
    }
    found |= {f"columns-{n}": Case(128, 8, 4096, 8 * n, 8) for n in COLUMNS}
    files = {}
    for name, case in found.items():
        files.setdefault((case.experts, case.shard.size), name)
    return {name: found[name] for name in files.values()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cases", nargs="+", default=[""], help="only those whose name contains one")
    add("--tokens", type=int, nargs="+", default=TOKENS)
    add("--out", type=Path, default=CONFIGS, help="folder of config files")
    args = parser.parse_args(argv)
    cases = named()
    chosen = [name for name in cases if any(text in name for text in args.cases)]
    tune([cases[name] for name in chosen], args.tokens, args.out)


if __name__ == "__main__":
    main()
