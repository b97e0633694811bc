# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Block-FP8 expert weights for tensor-parallel sizes that cut a quant block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import vllm.envs as envs
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod

from . import engagement
from .expert_loader import (
    ExpertParameter,
    LoadedTensor,
    check_loaded,
    padded_weight_loader,
)
from .expert_store import why_padded
from .shard import BlockShard, block_shard
from .window import Window

logger = init_logger("vllm.fp8_tp_padding")


def needs_padding(quant_config: Fp8Config, layer: RoutedExperts) -> bool:
    """Whether ``layer``'s experts are cut inside a quant block and can be padded.

    Never true for per-tensor scales, for sizes that fall on block boundaries,
    under expert parallelism, or with ``VLLM_FP8_TP_PADDING=off``.
    """
    moe = layer.moe_config
    blocks = quant_config.weight_block_size
    if blocks is None or moe.moe_parallel_config.use_ep:
        return False
    size = moe.intermediate_size // moe.tp_size
    if all(size % block == 0 for block in blocks):
        return False
    if envs.VLLM_FP8_TP_PADDING == "off":
        return False
    obstacle = _obstacle(moe, blocks)
    if obstacle is None:
        return True
    logger.warning_once(
        "FP8 TP padding is off for experts of %d / TP %d = %d columns, which cut the "
        "quant blocks %s; they are left to stock vLLM: %s.",
        moe.intermediate_size,
        moe.tp_size,
        size,
        str(blocks),
        obstacle,
    )
    return False


def padded_moe_method(
    quant_config: Fp8Config, layer: RoutedExperts
) -> "Fp8TpPaddedMoEMethod | None":
    """Return the method for experts that are cut inside a quant block, else None."""
    if not needs_padding(quant_config, layer):
        return None
    return Fp8TpPaddedMoEMethod(quant_config, layer)


def _obstacle(moe: FusedMoEConfig, blocks: list[int]) -> str | None:
    """Why this layer cannot be padded, or None."""
    block_n, block_k = blocks
    if block_n != block_k:
        return "the blocks are not square"
    if moe.hidden_dim % block_k != 0:
        return f"hidden size {moe.hidden_dim} is not a multiple of {block_k} either"
    if moe.is_lora_enabled:
        return "LoRA adapters do not know about the padding"
    if not moe.is_act_and_mul and not hasattr(moe, "w13_num_shards"):
        return "this release has no block-FP8 experts without a gate projection"
    return None


def expert_shard(quant_config: Fp8Config, moe: FusedMoEConfig) -> BlockShard:
    """Where this rank's intermediate columns lie on the block grid.

    The rank and size are those of the experts, flattened over data parallelism.
    """
    block_n = quant_config.weight_block_size[0]
    return block_shard(moe.intermediate_size, block_n, moe.tp_rank, moe.tp_size)


def set_partition_size(moe: FusedMoEConfig, size: int) -> None:
    """Make ``size`` the intermediate columns that vLLM sees on this rank.

    The "unpadded" size follows: backends that know it take the padding to be at
    the end, while ours may also come first.
    """
    moe.intermediate_size_per_partition = size
    moe.intermediate_size_per_partition_unpadded = size


@contextmanager
def padded_sizes(quant_config: Fp8Config, moe: FusedMoEConfig) -> Iterator[None]:
    """Show the padded sizes while vLLM judges the layer, then restore them."""
    padded = moe.intermediate_size_per_partition
    unpadded = moe.intermediate_size_per_partition_unpadded
    set_partition_size(moe, expert_shard(quant_config, moe).span)
    try:
        yield
    finally:
        moe.intermediate_size_per_partition = padded
        moe.intermediate_size_per_partition_unpadded = unpadded


class Fp8TpPaddedMoEMethod(Fp8MoEMethod):
    """``Fp8MoEMethod`` on the checkpoint's grid of quant blocks.

    With masked kernels (``padded_because`` is None), weights are the rank's real
    columns, and only scales come in whole blocks. Otherwise the rank holds whole
    blocks of weights, too:

    The rank's slice of gate, up and down keeps the offset inside a block that
    it has in the checkpoint, between zeros: gate and up are padded in rows
    (``w13 = [gate span | up span]``), down in columns. Each block keeps its
    scale, and zero weights add nothing to an output. (vLLM's CPU kernel reads
    the FP8 code 0 as 2**-7, next to codes of up to 448: still nothing.) To
    vLLM, and so to the choice of kernel, the layer is one of ``span`` columns.

    Args:
        quant_config: A block-quantized FP8 config.
        layer: The experts, for which ``needs_padding`` holds.

    Raises:
        ValueError: The layer interleaves gate and up rows.

    """

    def __init__(self, quant_config: Fp8Config, layer: RoutedExperts):
        moe = layer.moe_config
        if moe.activation == MoEActivation.SWIGLUOAI:
            raise ValueError(
                f"{layer.layer_name}: w13_weight cannot be padded to quant blocks: "
                f"activation = {moe.activation.value} interleaves gate and up rows, "
                "and padding needs all gate rows before all up rows. Use a "
                "tensor-parallel size that keeps whole blocks, expert parallelism, "
                "or VLLM_FP8_TP_PADDING=off."
            )
        self.block_shard = expert_shard(quant_config, moe)
        # Stays set: vLLM allocates, and later runs, what the config says.
        set_partition_size(moe, self.block_shard.span)
        super().__init__(quant_config, layer)
        block = self.weight_block_size[0]
        self.padded_because = why_padded(layer, self.experts_cls, block)
        if self.padded_because is None:
            from .masked_experts import MaskedTritonExperts

            self.experts_cls = MaskedTritonExperts
        self._parameters: list[ExpertParameter] = []
        self._loaded: set[LoadedTensor] = set()

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ):
        super().create_weights(
            layer,
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            params_dtype,
            **extra_weight_attrs,
        )
        self._parameters = self._expert_parameters(hidden_size)
        stock_loader = extra_weight_attrs["weight_loader"]
        for parameter in self._parameters:
            param = getattr(layer, parameter.name)
            parameter.fit(param)
            param.weight_loader = padded_weight_loader(
                layer, stock_loader, parameter, self._loaded
            )
        self._record(num_experts, hidden_size)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        engagement.report(self.moe.tp_rank)
        try:
            check_loaded(layer, self._parameters, self._loaded)
        finally:
            self._loaded.clear()
        super().process_weights_after_loading(layer)

    def _expert_parameters(self, hidden_size: int) -> list[ExpertParameter]:
        total, block = self.moe.intermediate_size, self.weight_block_size[0]
        columns = Window.of_elements(self.block_shard, total)
        if self.padded_because is None:
            columns = columns.without_padding()
        blocks = Window.of_blocks(self.block_shard, total, block)
        gate_up = {"w1": 0, "w3": 1} if self.moe.is_act_and_mul else {"w1": 0}
        down = {"w2": 0}
        hidden, hidden_blocks = hidden_size, hidden_size // block
        w13_scale = f"w13_{self.weight_scale_name}"
        w2_scale = f"w2_{self.weight_scale_name}"
        w13_blocks = blocks.total, hidden_blocks
        w2_blocks = hidden_blocks, blocks.total
        make = ExpertParameter
        parameters = [
            make("w13_weight", "weight", (total, hidden), 0, columns, gate_up),
            make("w2_weight", "weight", (hidden, total), 1, columns, down),
            make(w13_scale, "scale", w13_blocks, 0, blocks, gate_up),
            make(w2_scale, "scale", w2_blocks, 1, blocks, down),
        ]
        if self.moe.has_bias:
            # Ranks are summed, so the bias of down counts on one of them.
            mine = Window(hidden, 0, 0 if self.moe.tp_rank else hidden, 0, hidden)
            parameters += [
                make("w13_bias", "bias", (total,), 0, columns, gate_up),
                make("w2_bias", "bias", (hidden,), 0, mine, down),
            ]
        return parameters

    def _record(self, num_experts: int, hidden_size: int) -> None:
        block = self.weight_block_size[0]
        size = engagement.PaddedSize(
            "MoE",
            self.moe.intermediate_size,
            block,
            self.moe.tp_size,
            self.padded_because,
        )
        projections = 3 if self.moe.is_act_and_mul else 2
        engagement.record(size, projections * num_experts * hidden_size)
