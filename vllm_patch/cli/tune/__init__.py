# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch tune``: tiles of the masked kernels, for a model and this GPU.

    cases          the experts that a model has on a rank
    candidates     which tiles are tried
    errors         how far two outputs are apart
    graph_timing   the time of CUDA graphs
    experts        a rank's experts on the GPU: runs, times, compares
    ahead          compiles in processes of their own
    search         what is tried after what, and what is taken
    command        files, progress and the table

Only ``cases`` and ``command`` are imported before they are needed: the rest imports
vLLM, torch or Triton.
"""

from vllm_patch.cli.tune.command import add_parser

__all__ = ["add_parser"]
