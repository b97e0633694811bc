# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Lets a kernel start while the one before it in the stream still ends.

The kernel waits for that one to end before it writes anything, or reads what that one
writes; and only then it lets the next one start. So what earlier ones have written may
be read from the start.
"""

import functools

from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton


@triton.jit
def wait_for_previous(USE_PDL: tl.constexpr):
    """Wait for the kernel before this one to end."""
    if USE_PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(USE_PDL: tl.constexpr):
    """Let the kernel after this one start, once all programs say so or end."""
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()


def dependent_launch(on: bool) -> dict[str, bool]:
    """Return launch options and the constant ``USE_PDL`` of a Triton kernel."""
    return {"USE_PDL": True, "launch_pdl": True} if on else {"USE_PDL": False}


# Cached, since each call of a layer asks, and vLLM would ask torch.
@functools.cache
def launches_dependently() -> bool:
    """Whether kernels of linear layers start while the one before them ends.

    Those of experts do where their tiles say so (``Tiles.pdl``).
    """
    return current_platform.is_cuda() and current_platform.is_arch_support_pdl()
