# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Lets a kernel start while the one before it in the stream still ends.

The kernel waits for that one (``gdc_wait``) before it touches memory.
"""

import functools

from vllm.platforms import current_platform


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
