"""Builds vLLM layers as one rank of a tensor-parallel group, without the others."""

import contextlib
import functools
import types
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def rank_of(
    tp_size: int, rank: int, moe_backend: str = "auto", expert_parallel: bool = False
) -> Iterator[None]:
    """Make this process rank ``rank`` of ``tp_size`` for layers that do not talk.

    vLLM's linear layers and experts read their rank and the size of the group when
    they are built, and talk to other ranks only to reduce or gather results.

    Args:
        tp_size: Tensor-parallel size.
        rank: This rank.
        moe_backend: ``kernel_config.moe_backend``.
        expert_parallel: Give each rank whole experts.

    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    group = types.SimpleNamespace(world_size=tp_size, rank_in_group=rank)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with (
            mock.patch.object(parallel_state, "_TP", group),
            set_current_vllm_config(_config(moe_backend, expert_parallel)),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


@functools.cache
def _config(moe_backend: str, expert_parallel: bool):
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig

    # As for any block-FP8 model, activations are quantized by vLLM's CUDA kernel.
    compilation = CompilationConfig(mode=CompilationMode.NONE, custom_ops=["all"])
    config = VllmConfig(compilation_config=compilation)
    config.model_config = types.SimpleNamespace(
        dtype=torch.bfloat16, hf_text_config=None, hf_config=None
    )
    config.kernel_config.moe_backend = moe_backend
    config.parallel_config.enable_expert_parallel = expert_parallel
    return config
