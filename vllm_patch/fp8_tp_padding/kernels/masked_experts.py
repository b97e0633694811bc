# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's Triton experts on compact weights, as its choice of kernels knows them."""

import functools
import itertools

import torch

import vllm.envs as envs
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kFp8Dynamic128Sym,
    kFp8Static128BlockSym,
)
from vllm.platforms import current_platform

from ..slices.shard import block_shard
from .fp8_quant import BLOCK
from .masked_activation import Activation
from .masked_moe import PairPlan, Problem, Routing, SortedPlan, Weights, plan_for
from .masked_warmup import warm_up
from .tile_choice import tiles_for
from .workspace import bytes_of

# Down holds its tiles of all blocks in shared memory.
MAX_BLOCKS = 4
# Tokens up to which fewer may need more memory: what is split along K, or sorted.
# Beyond, tiles only come in an order in which more tokens need more.
FEW_TOKENS = 1024


class MaskedTritonExperts(TritonExperts):
    """``TritonExperts`` whose weights hold only the rank's real columns.

    The input is quantized in the launch that counts each expert's tokens, and the
    intermediate in one of the two products, so neither is a pass of its own.

    vLLM may choose them for layers whose config has an ``fp8_tp_shard``, which those
    that are cut inside a quant block get (``methods/experts.py``), and only for them.
    """

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig):
        super().__init__(moe_config, quant_config)
        self.block_shard = block_shard(
            moe_config.intermediate_size, BLOCK, moe_config.tp_rank, moe_config.tp_size
        )
        self.masked_activation = Activation.of(moe_config)
        # Up to as many, no call compiles anything.
        self._warm_tokens = 0

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        """Return whether they take a layer, or False and why not."""
        if getattr(moe_config, "fp8_tp_shard", None) is None:
            return False, "no quant block is cut"
        keys = weight_key, activation_key
        if keys != (kFp8Static128BlockSym, kFp8Dynamic128Sym):
            return False, f"masked kernels do not take {weight_key} x {activation_key}"
        supported, reason = TritonExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        if supported:
            reason = cls.why_padded(moe_config)
        return reason is None, reason

    @staticmethod
    def why_padded(moe: FusedMoEConfig) -> str | None:
        """Return why these experts do not take a cut layer, or None."""
        if envs.VLLM_FP8_TP_PADDING == "padded":
            return "VLLM_FP8_TP_PADDING=padded"
        if not current_platform.is_cuda():
            return "masked kernels are written for CUDA"
        # Up to 0.28, the key of the weights is the same for all blocks.
        shard = moe.fp8_tp_shard
        if (block := shard.span // shard.num_blocks) != BLOCK:
            return f"masked kernels take blocks of {BLOCK}, not {block}"
        if Activation.of(moe) is None:
            return f"masked kernels do not compute {moe.activation.value}"
        if moe.has_bias:
            return "masked kernels add no biases"
        if moe.is_lora_enabled:
            return "masked kernels take no LoRA adapters"
        if moe.moe_parallel_config.dp_size > 1:
            return "masked kernels quantize after the dispatch, not before it"
        if envs.VLLM_BATCH_INVARIANT:
            return "masked kernels depend on the batch size"
        most = max(
            block_shard(moe.intermediate_size, BLOCK, rank, moe.tp_size).num_blocks
            for rank in range(moe.tp_size)
        )
        if most > MAX_BLOCKS:
            return f"masked kernels take up to {MAX_BLOCKS} blocks a rank, not {most}"
        return None

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        dtype = self.moe_config.in_dtype
        sizes = topk, K, local_num_experts, self.block_shard, dtype, True
        # vLLM keeps the output in the first workspace: nothing else may live there.
        output = (M, K)
        needed = workspace_bytes(M, *sizes, self.masked_activation)
        return output, (needed // dtype.itemsize,), output

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ):
        if getattr(self, "post_gemm2_hook", None) is not None:
            raise NotImplementedError(
                "post_gemm2_hook needs the output of each expert, which masked kernels "
                "do not keep. Set VLLM_FP8_TP_PADDING=padded for this model."
            )
        assert expert_map is None, "Experts are not cut under expert parallelism"
        assert hidden_states.is_contiguous(), "Hidden_states must be contiguous"
        assert hidden_states.shape[-1] == w1.shape[2], "Hidden size mismatch"
        num_tokens, hidden = hidden_states.shape
        sizes = (
            *(topk_ids.shape[1], hidden, w1.shape[0], self.block_shard, output.dtype),
            not apply_router_weight_on_input,
            self.masked_activation,
        )
        call = (
            output,
            _aligned(hidden_states),
            Weights(w1, w2, self.w1_scale, self.w2_scale),
            Routing(_aligned(topk_weights), _aligned(topk_ids)),
            workspace2,
        )
        if num_tokens > self._warm_tokens:
            self._warm_tokens = warm_up(lambda n: planned(n, *sizes), *call)
        planned(num_tokens, *sizes).run(*call)


def _plan(*sizes) -> PairPlan | SortedPlan:
    """Return how a call is run; ``sizes`` are all fields of its ``Problem``."""
    of = Problem(*sizes)
    tiles = tiles_for(of.num_tokens, of.top_k, of.num_experts, of.hidden, of.shard)
    return plan_for(of, tiles)


# Each call of a layer asks several times, and layers of a model ask the same.
planned = functools.lru_cache(maxsize=1024)(_plan)


def workspace_bytes(num_tokens: int, *sizes) -> int:
    """Return what a call needs, and at least what those with fewer tokens do.

    vLLM sizes its workspace by the largest call.
    """
    few = _bytes_of_few(*sizes)[min(num_tokens, FEW_TOKENS) - 1]
    return max(planned(num_tokens, *sizes).workspace_bytes, few)


@functools.cache
def _bytes_of_few(*sizes) -> list[int]:
    """Return the most bytes of calls of up to 1, 2, 3 and so on tokens."""
    tokens = range(1, FEW_TOKENS + 1)
    each = (bytes_of(_plan(number, *sizes).buffers()) for number in tokens)
    return [*itertools.accumulate(each, max)]


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, contiguous and on a multiple of 16 bytes, copied if need be.

    For one that is not, Triton would compile each kernel once more.
    """
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
