# SPDX-License-Identifier: Apache-2.0
"""What a format of checkpoints has to say, and what comes of it for a layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.fp8_tp_padding")

# The only ones that vLLM has kernels for, but for plain FP8.
BLOCKS = [128, 128]
# Part of the name of a method or of its scheme -> elements of a group of its weights
# along an output's sum. Scales of whole columns or tensors are never cut, nor what vLLM
# quantizes by itself after it has cut the weights.
GROUPS = {"mxfp": 32, "ocp_mx": 32, "nvfp4": 16}


def cut_or_stock(extended: type, method, blocks: Sequence[int] | None, layer):
    """Return vLLM's method for a linear layer; if that is cut, as one of ours.

    Args:
        extended: The class of ours that extends the method's.
        method: What vLLM made.
        blocks: The quant blocks of the layer's weight.
        layer: The layer.

    """
    from vllm_patch.fp8_tp_padding.methods.linear import cut_layout

    layout = cut_layout(blocks, layer)
    return method if layout is None else extended.made_of(method, layout)


def linear_of_schemes(stock: type, extended: type, *schemes: type) -> Callable:
    """Return a format's ``linear`` where vLLM keeps a scheme on each layer.

    Args:
        stock: vLLM's class of methods, which call the scheme.
        extended: The class of ours that extends it.
        schemes: Those that have quant blocks.

    """

    def linear(layer, method):
        if type(method) is not stock or type(layer.scheme) not in schemes:
            return method
        return cut_or_stock(extended, method, layer.scheme.weight_block_size, layer)

    return linear


@dataclass(frozen=True)
class CheckpointFormat:
    """How cut layers of one of vLLM's quantization configs get methods of ours.

    Attributes:
        blocks: Takes the config; returns the quant blocks that its experts have if they
            have any, else None.
        experts: vLLM's class of methods for such experts -> the class of ours that
            extends it.
        linear: Takes a linear layer and vLLM's method for it; returns what becomes of
            that, which is itself where the layer is not cut.

    """

    blocks: Callable[[Any], Sequence[int] | None]
    experts: dict[type, type]
    linear: Callable[[Any, Any], Any]

    def quant_method(self, stock: Callable, config, layer, prefix) -> Any:
        """Return a layer's method: ours if it is cut inside a quant block.

        Every other layer, and every layer whose method is not of this format, gets
        exactly what ``stock``, a config's ``get_quant_method``, returns.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

        if isinstance(layer, RoutedExperts):
            return self._experts_method(stock, config, layer, prefix)
        method = stock(config, layer, prefix)
        if not isinstance(layer, LinearBase):
            return method
        if isinstance(layer, RowParallelLinear):
            sizes = layer.input_size, layer.tp_size
            _name_cut_groups(method, layer, "Row-parallel layers", *sizes)
        return self.linear(layer, method)

    def _experts_method(self, stock: Callable, config, layer, prefix) -> Any:
        from vllm_patch.fp8_tp_padding.methods import experts

        blocks, moe = self.blocks(config), layer.moe_config
        if not experts.is_cut(blocks, moe):
            return _stock_experts(stock, config, layer, prefix)
        # Only vLLM knows whether it quantizes this layer, and it may refuse the
        # cut size before it says so: ask it about the padded one.
        with experts.cut_sizes(blocks, moe):
            method = stock(config, layer, prefix)
        extended = self.experts.get(type(method))
        is_of_format = extended is not None and method.weight_block_size == blocks
        if not is_of_format or experts.is_left_to_stock(blocks, layer):
            return _stock_experts(stock, config, layer, prefix)
        return extended.made_of(method, layer)


def _stock_experts(stock: Callable, config, layer, prefix) -> Any:
    """Return vLLM's method; say if it cuts groups, which nobody pads."""
    method, moe = stock(config, layer, prefix), layer.moe_config
    if not moe.moe_parallel_config.use_ep:
        _name_cut_groups(method, layer, "Experts", moe.intermediate_size, moe.tp_size)
    return method


def _name_cut_groups(method, layer, layers: str, total: int, tp_size: int) -> None:
    """Warn of layers whose scales belong to groups that tensor parallelism cuts."""
    size = total // tp_size
    schemes = (getattr(each, "scheme", None) for each in (method, layer))
    for each in (method, *schemes, getattr(method, "wkey", None)):
        name = type(each).__name__
        for part, group in GROUPS.items():
            if part in name.lower() and size % group:
                logger.warning_once(
                    "%s of %d / TP %d = %d columns cut the groups of %d of %s and are "
                    "left to stock vLLM: only FP8 in blocks is padded.",
                    *(layers, total, tp_size, size, group, name),
                )
                return
