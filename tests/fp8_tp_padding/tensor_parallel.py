# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One process that plays one rank of a tensor-parallel group."""

import contextlib
import os
import types

import pytest
import torch

GROUPS = ("_TP", "_DP", "_PCP", "_PP", "_EP", "_DCP", "_WORLD")

# In float32 on the CPU, where FP8 kernels are exact.
runs_kernels = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs kernels in Triton's interpreter: set TRITON_INTERPRET=1",
)


class RankOfGroup:
    """Stands for a ``GroupCoordinator``; it has no other ranks to talk to."""

    device_group = cpu_group = device_communicator = None
    unique_name = "look-alike:0"

    def __init__(self, world_size: int = 1, rank: int = 0):
        self.world_size = world_size
        self.rank = self.rank_in_group = self.local_rank = rank
        self.ranks = list(range(world_size))
        self.is_first_rank = rank == 0
        self.is_last_rank = rank == world_size - 1

    def all_reduce(self, x):
        return x


@contextlib.contextmanager
def rank_of(tp_size: int, rank: int, dtype=torch.bfloat16, dp=(1, 0), backend="auto"):
    """Make the current process rank ``rank`` of ``tp_size``, with a vLLM config.

    Args:
        tp_size: Tensor-parallel size.
        rank: This rank.
        dtype: The model's dtype.
        dp: Data-parallel size and rank.
        backend: ``kernel_config.moe_backend``.

    """
    import vllm.distributed.parallel_state as parallel_state
    from vllm.config import (
        CompilationConfig,
        DeviceConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.v1.worker import workspace

    names = [name for name in GROUPS if hasattr(parallel_state, name)]
    before = {name: getattr(parallel_state, name) for name in names}
    groups = {
        "_TP": RankOfGroup(tp_size, rank),
        "_WORLD": RankOfGroup(tp_size, rank),
        "_DP": RankOfGroup(*dp),
    }
    for name in names:
        setattr(parallel_state, name, groups.get(name, RankOfGroup()))
    config = VllmConfig(
        device_config=DeviceConfig(device="cpu"),
        # As vLLM sets it for every model with block-quantized weights.
        compilation_config=CompilationConfig(custom_ops=["+quant_fp8"]),
    )
    config.model_config = types.SimpleNamespace(
        dtype=dtype,
        hf_config=None,
        is_quantized=True,
        enforce_eager=True,
        quantization="fp8",
        is_moe=True,
        use_mla=False,
    )
    config.kernel_config.moe_backend = backend
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with set_current_vllm_config(config):
            if workspace._manager is None:
                workspace.init_workspace_manager(torch.device("cpu"))
            yield config
    finally:
        torch.set_default_dtype(default_dtype)
        for name, group in before.items():
            setattr(parallel_state, name, group)
