"""Runs ``benchmarks.engine_row`` where vLLM's FP8 operators for CPUs are."""

import sys

from benchmarks import engine_row
from vllm_patch.cli.cpu_fp8 import operators

if __name__ == "__main__":
    operators.install()
    engine_row.main(*sys.argv[1:])
