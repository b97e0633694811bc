"""The command ``vllm``, on a CPU with the FP8 operators that parity gives to it."""

import sys

from vllm_patch.cli.cpu_fp8 import operators

if __name__ in ("__main__", "__mp_main__"):  # The latter in processes it spawns.
    operators.install()

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
