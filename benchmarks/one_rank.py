"""vLLM's layers and engine as one rank of a tensor-parallel group, alone."""

import contextlib
import functools
import importlib
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


def engine_is_rank_of(tp_size: int, rank: int) -> None:
    """Make engines of this process run as one rank of ``tp_size``.

    They are built with a group of one. Once that is there, it says that it has
    ``tp_size`` ranks: layers load and compute what this rank would. A sum is this
    rank's part, and what would be gathered is this rank's, repeated. So that there is
    something to compute, any token is taken for one of those that it embeds.

    Args:
        tp_size: Tensor-parallel size.
        rank: This rank.

    """
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        VocabParallelEmbedding,
    )
    from vllm.platforms import current_platform
    from vllm.v1.worker import gpu_worker

    workers = [gpu_worker]
    if current_platform.is_cpu():
        workers.append(importlib.import_module("vllm.v1.worker.cpu_worker"))
    stock = gpu_worker.init_worker_distributed_environment

    def repeated(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat([x] * tp_size, dim)

    def init(vllm_config, *args, **kwargs) -> None:
        stock(vllm_config, *args, **kwargs)
        group = parallel_state.get_tp_group()
        group.world_size, group.rank_in_group = tp_size, rank
        group._all_reduce_out_place = torch.clone
        group._all_gather_out_place = repeated
        group.all_gather = repeated
        group.gather = lambda x, dst=0, dim=-1: repeated(x, dim)
        vllm_config.parallel_config.tensor_parallel_size = tp_size

    for worker in workers:
        worker.init_worker_distributed_environment = init
    embed = VocabParallelEmbedding.forward

    def embed_own(self, tokens: torch.Tensor) -> torch.Tensor:
        own = self.shard_indices
        start, end = own.org_vocab_start_index, own.org_vocab_end_index
        return embed(self, start + tokens % (end - start))

    VocabParallelEmbedding.forward = embed_own


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
