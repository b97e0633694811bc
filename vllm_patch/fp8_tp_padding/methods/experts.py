# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's methods for experts that are cut inside a quant block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from typing_extensions import Self

import vllm.envs as envs
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod

from ..loading import lora_slices
from ..loading.expert_loader import expert_loader, fit
from ..loading.sliced_tensor import SlicedTensor, SlicedTensors
from ..slices.shard import BlockShard, block_shard
from ..slices.window import Window
from . import engagement
from .store import Compact, store_for

logger = init_logger("vllm.fp8_tp_padding")


def cuts_blocks(blocks: list[int] | None, moe: FusedMoEConfig) -> bool:
    """Whether tensor parallelism cuts experts inside a quant block.

    Never true for per-tensor scales, for sizes that fall on block boundaries, or
    under expert parallelism.
    """
    if blocks is None or moe.moe_parallel_config.use_ep:
        return False
    size = moe.intermediate_size // moe.tp_size
    return any(size % block != 0 for block in blocks)


def is_cut(blocks: list[int] | None, moe: FusedMoEConfig) -> bool:
    """Whether experts are cut, and not left so by ``VLLM_FP8_TP_PADDING=off``."""
    return cuts_blocks(blocks, moe) and envs.VLLM_FP8_TP_PADDING != "off"


def is_left_to_stock(blocks: list[int], layer: RoutedExperts) -> bool:
    """Whether there is no method for these cut experts; warns why."""
    moe = layer.moe_config
    reason = obstacle(blocks, layer)
    if reason is None:
        return False
    logger.warning_once(
        "Experts of %d / TP %d = %d columns cut the quant blocks %s and are left to "
        "stock vLLM: %s.",
        moe.intermediate_size,
        moe.tp_size,
        moe.intermediate_size // moe.tp_size,
        str(blocks),
        reason,
    )
    return True


def cut_experts_method(
    quant_config: Fp8Config, layer: RoutedExperts
) -> "CutFp8MoEMethod | None":
    """Return the method for experts that are cut inside a quant block, else None."""
    blocks, moe = quant_config.weight_block_size, layer.moe_config
    if not is_cut(blocks, moe) or is_left_to_stock(blocks, layer):
        return None
    with cut_sizes(blocks, moe):
        method = Fp8MoEMethod(quant_config, layer)
    return CutFp8MoEMethod.made_of(method, layer)


def obstacle(blocks: list[int], layer: RoutedExperts) -> str | None:
    """Why these experts are left to stock vLLM, or None."""
    moe, (block_n, block_k) = layer.moe_config, blocks
    if type(layer).weight_loader is not RoutedExperts.weight_loader:
        return f"{type(layer).__name__} loads weights in a way of its own"
    if block_n != block_k:
        return "the blocks are not square"
    if moe.hidden_dim % block_k != 0:
        return f"hidden size {moe.hidden_dim} is not a multiple of {block_k} either"
    if moe.is_lora_enabled and not lora_slices.are_cut():
        return "LoRA adapters do not know about the padding"
    if not moe.is_act_and_mul and not hasattr(moe, "w13_num_shards"):
        return "this release has no block-FP8 experts without a gate projection"
    return None


def expert_shard(blocks: list[int], moe: FusedMoEConfig) -> BlockShard:
    """Where this rank's intermediate columns lie on the block grid.

    The rank and size are those of the experts, flattened over data parallelism.
    """
    return block_shard(moe.intermediate_size, blocks[0], moe.tp_rank, moe.tp_size)


def _show(shard: BlockShard, moe: FusedMoEConfig) -> None:
    """Make the layer one of ``span`` columns to vLLM, and so to its choice of kernel.

    The "unpadded" size follows: backends that know it take the padding to be at
    the end, while ours may also come first. Experts that take compact weights know
    the layer by its slice.
    """
    moe.intermediate_size_per_partition = shard.span
    moe.intermediate_size_per_partition_unpadded = shard.span
    moe.fp8_tp_shard = shard


@contextmanager
def cut_sizes(blocks: list[int], moe: FusedMoEConfig) -> Iterator[None]:
    """Show vLLM the layer of whole blocks while it judges it, then the real one."""
    padded = moe.intermediate_size_per_partition
    unpadded = moe.intermediate_size_per_partition_unpadded
    _show(expert_shard(blocks, moe), moe)
    try:
        yield
    finally:
        moe.intermediate_size_per_partition = padded
        moe.intermediate_size_per_partition_unpadded = unpadded
        moe.fp8_tp_shard = None


class CutExperts:
    """What methods for cut experts have in common, beside one of vLLM's own.

    Where vLLM chooses experts that take compact weights, the rank stores its real
    columns, and only scales come in whole blocks. Otherwise weights come in whole
    blocks, too:

    The rank's slice of gate, up and down keeps the offset inside a block that
    it has in the checkpoint, between zeros: gate and up are padded in rows
    (``w13 = [gate span | up span]``), down in columns. Each block keeps its
    scale, and zero weights add nothing to an output. (vLLM's CPU kernel reads
    the FP8 code 0 as 2**-7, next to codes of up to 448: still nothing.)

    Attributes:
        block_shard: The rank's columns.
        store: ``Compact()`` or ``Padded(because)``.
        weight_scale_name: What follows ``w13_`` and ``w2_`` in the names of block
            scales. It is of vLLM's method, as are ``moe``, ``weight_block_size``,
            ``fp8_backend`` and ``experts_cls``.

    """

    weight_scale_name: str

    @classmethod
    def made_of(cls, method: FusedMoEMethodBase, layer: RoutedExperts) -> Self:
        """Return a method that vLLM made while it saw ``cut_sizes``, as one of ours.

        Whatever it takes to make one is left to vLLM: only the class changes.

        Args:
            method: One of the class that this one extends.
            layer: The experts, for which ``is_cut`` holds.

        Raises:
            ValueError: The layer interleaves gate and up rows.

        """
        moe = layer.moe_config
        if moe.activation == MoEActivation.SWIGLUOAI:
            raise ValueError(
                f"{layer.layer_name}: w13_weight cannot be padded to quant blocks: "
                f"activation = {moe.activation.value} interleaves gate and up rows, "
                "and padding needs all gate rows before all up rows. Use a "
                "tensor-parallel size that keeps whole blocks, expert parallelism, "
                "or VLLM_FP8_TP_PADDING=off."
            )
        cut = object.__new__(cls)
        vars(cut).update(vars(method))
        cut.block_shard = expert_shard(method.weight_block_size, moe)
        # For good: vLLM allocates, and later runs, what the config says.
        _show(cut.block_shard, moe)
        cut.store = store_for(cut.experts_cls, cut.fp8_backend, moe)
        return cut

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
        has_biases = getattr(layer, "w13_bias", None) is not None
        sliced = self._sliced_tensors(hidden_size, has_biases)
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

    def _sliced_tensors(self, hidden_size: int, has_biases: bool) -> list[SlicedTensor]:
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
        if has_biases:
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


class CutFp8MoEMethod(CutExperts, Fp8MoEMethod):
    """``Fp8MoEMethod`` on the checkpoint's grid of quant blocks."""
