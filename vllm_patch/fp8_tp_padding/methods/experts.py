# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's ``Fp8MoEMethod`` for experts that are cut inside a quant block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import vllm.envs as envs
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod

from ..loading.expert_loader import expert_loader, fit
from ..loading.sliced_tensor import SlicedTensor, SlicedTensors
from ..slices.shard import BlockShard, block_shard
from ..slices.window import Window
from . import engagement
from .store import Compact, store_for

logger = init_logger("vllm.fp8_tp_padding")


def is_cut(quant_config: Fp8Config, layer: RoutedExperts) -> bool:
    """Whether experts are cut inside a quant block, and are not left to stock vLLM.

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
        "Experts of %d / TP %d = %d columns cut the quant blocks %s and are left to "
        "stock vLLM: %s.",
        moe.intermediate_size,
        moe.tp_size,
        size,
        str(blocks),
        obstacle,
    )
    return False


def cut_experts_method(
    quant_config: Fp8Config, layer: RoutedExperts
) -> "CutFp8MoEMethod | None":
    """Return the method for experts that are cut inside a quant block, else None."""
    if not is_cut(quant_config, layer):
        return None
    return CutFp8MoEMethod(quant_config, layer)


def _obstacle(moe: FusedMoEConfig, blocks: list[int]) -> str | None:
    """Why this layer is left to stock vLLM, or None."""
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


def _set_partition_size(moe: FusedMoEConfig, size: int) -> None:
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
    _set_partition_size(moe, expert_shard(quant_config, moe).span)
    try:
        yield
    finally:
        moe.intermediate_size_per_partition = padded
        moe.intermediate_size_per_partition_unpadded = unpadded


class CutFp8MoEMethod(Fp8MoEMethod):
    """``Fp8MoEMethod`` on the checkpoint's grid of quant blocks.

    To vLLM, and so to the choice of kernel, the layer is one of ``span`` columns.
    Where it chooses experts that take compact weights, the rank stores its real
    columns, and only scales come in whole blocks. Otherwise weights come in whole
    blocks, too:

    The rank's slice of gate, up and down keeps the offset inside a block that
    it has in the checkpoint, between zeros: gate and up are padded in rows
    (``w13 = [gate span | up span]``), down in columns. Each block keeps its
    scale, and zero weights add nothing to an output. (vLLM's CPU kernel reads
    the FP8 code 0 as 2**-7, next to codes of up to 448: still nothing.)

    Args:
        quant_config: A block-quantized FP8 config.
        layer: The experts, for which ``is_cut`` holds.

    Attributes:
        block_shard: The rank's columns.
        store: ``Compact()`` or ``Padded(because)``.

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
        # Both stay set: vLLM allocates, and later runs, what the config says, and
        # experts that take compact weights know the layer by its slice.
        _set_partition_size(moe, self.block_shard.span)
        moe.fp8_tp_shard = self.block_shard
        super().__init__(quant_config, layer)
        self.store = store_for(self.experts_cls, self.fp8_backend, moe)

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
        sliced = self._sliced_tensors(hidden_size)
        self._tensors = SlicedTensors(layer.layer_name, sliced, num_experts)
        stock_loader = extra_weight_attrs["weight_loader"]
        for name in {tensor.parameter: None for tensor in sliced}:
            param = getattr(layer, name)
            fit(param, self._tensors, name)
            param.weight_loader = expert_loader(
                layer, stock_loader, self._tensors, name
            )
        self._record(num_experts, hidden_size)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        engagement.report(self.moe.tp_rank)
        self._tensors.check_loaded(layer)
        super().process_weights_after_loading(layer)

    def _sliced_tensors(self, hidden_size: int) -> list[SlicedTensor]:
        total, block = self.moe.intermediate_size, self.weight_block_size[0]
        columns = Window.of_elements(self.block_shard, total)
        if self.store == Compact():
            columns = columns.without_padding()
        blocks = Window.of_blocks(self.block_shard, total, block)
        hidden = Window.whole(hidden_size)
        tensors = [
            *self._projections("weight", "weight", columns, hidden),
            *self._projections(
                self.weight_scale_name,
                "scale",
                blocks,
                Window.whole(hidden_size // block),
            ),
        ]
        if self.moe.has_bias:
            # Ranks are summed, so the bias of down counts on one of them.
            mine = hidden_size if self.moe.tp_rank == 0 else 0
            down = Window(hidden_size, 0, mine, 0, hidden_size)
            tensors += [
                *self._gate_up("bias", "bias", (columns,)),
                SlicedTensor("w2_bias", "w2", "bias", (down,)),
            ]
        return tensors

    def _projections(
        self, name: str, kind: str, columns: Window, hidden: Window
    ) -> list[SlicedTensor]:
        down = SlicedTensor(f"w2_{name}", "w2", kind, (hidden, columns))
        return [*self._gate_up(name, kind, (columns, hidden)), down]

    def _gate_up(
        self, name: str, kind: str, windows: tuple[Window, ...]
    ) -> list[SlicedTensor]:
        shards = ["w1", "w3"] if self.moe.is_act_and_mul else ["w1"]
        return [
            SlicedTensor(f"w13_{name}", shard, kind, windows, index * windows[0].span)
            for index, shard in enumerate(shards)
        ]

    def _record(self, num_experts: int, hidden_size: int) -> None:
        moe, block = self.moe, self.weight_block_size[0]
        size = engagement.CutSize(
            "MoE", moe.intermediate_size, block, moe.tp_size, self.store
        )
        projections = 3 if moe.is_act_and_mul else 2
        engagement.record(size, projections * num_experts * hidden_size)
