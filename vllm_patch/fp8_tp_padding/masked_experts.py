# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's Triton experts, on a compact store with the masked kernels."""

import torch

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

from .masked_moe import Problem, Routing, Weights, masked_moe
from .shard import block_shard
from .tiles import BLOCK, Tiles, tiles_for


class MaskedTritonExperts(TritonExperts):
    """``TritonExperts`` whose weights hold only the rank's real columns.

    The input is quantized in the launch that counts each expert's tokens, and the
    intermediate in one of the two products, so neither is a pass of its own.
    """

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig):
        super().__init__(moe_config, quant_config)
        self.block_shard = block_shard(
            moe_config.intermediate_size, BLOCK, moe_config.tp_rank, moe_config.tp_size
        )

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
        num_ids = max(global_num_experts, local_num_experts)
        tiles = self._tiles(M, topk, local_num_experts, K)
        problem = Problem(M, topk, K, num_ids, self.block_shard, dtype, tiles)
        # vLLM keeps the output in the first workspace: nothing else may live there.
        output = (M, K)
        return output, (problem.workspace_bytes // dtype.itemsize,), output

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
        assert hidden_states.is_contiguous(), "Hidden_states must be contiguous"
        assert hidden_states.shape[-1] == w1.shape[2], "Hidden size mismatch"
        num_tokens, hidden = hidden_states.shape
        num_experts, top_k = w1.shape[0], topk_ids.shape[1]
        problem = Problem(
            num_tokens,
            top_k,
            hidden,
            num_experts if expert_map is None else global_num_experts,
            self.block_shard,
            output.dtype,
            self._tiles(num_tokens, top_k, num_experts, hidden),
        )
        masked_moe(
            output,
            hidden_states,
            Weights(w1, w2, self.w1_scale, self.w2_scale),
            Routing(
                topk_weights.contiguous(),
                topk_ids.contiguous(),
                expert_map,
                not apply_router_weight_on_input,
            ),
            problem,
            workspace2,
        )

    def _tiles(self, tokens: int, top_k: int, experts: int, hidden: int) -> Tiles:
        return tiles_for(tokens, top_k, experts, hidden, self.block_shard)
