# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where ``hopper_gate_up.py`` runs: its warps specialize, for which it is in Gluon.

Gluon is not there without Triton, and changes with each release of it.
"""

import functools
from types import ModuleType

from vllm.triton_utils import triton

from .tiles import Tile

# Releases of Triton with which it runs; with 3.7 it compiles to the same.
TRITON = "3.6", "3.7", "3.8"
# How it cuts its output.
TILE = Tile(block_n=64, num_warps=4, num_stages=6)


@functools.cache
def hopper_gate_up() -> ModuleType | None:
    """Return the module of the kernel, or None where Triton cannot compile it."""
    release = ".".join(triton.__version__.split(".")[:2])
    if release not in TRITON or triton.knobs.runtime.interpret:
        return None
    from . import hopper_gate_up

    return hopper_gate_up
