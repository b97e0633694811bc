# SPDX-License-Identifier: Apache-2.0
"""What a format of checkpoints has to say, and what comes of it for a layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import vllm.envs as envs
from vllm.logger import init_logger
from vllm_patch.wrappers import OFF

from .left_to_stock import IS_OFF, SMALLER_TP, explain, explained

logger = init_logger("vllm.fp8_tp_padding")

# The only ones that vLLM has kernels for, but for plain FP8.
BLOCKS = [128, 128]
# Part of the name of a method or of its scheme -> elements of a group of its weights
# along an output's sum. Scales of whole columns or tensors are never cut, nor what vLLM
# quantizes by itself after it has cut the weights.
GROUPS = {"mxfp": 32, "ocp_mx": 32, "nvfp4": 16, "w4a4fp4": 16}


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
    if layout is not None:
        return extended.made_of(method, layout)
    if why := why_left(blocks, layer):
        explain(method, layer.prefix, why)
    return method


def why_left(blocks: Sequence[int] | None, layer) -> str | None:
    """Return why a linear layer that is cut is left to stock vLLM; None if it is not.

    Args:
        blocks: The quant blocks of its weight.
        layer: The layer, for which ``cut_layout`` is None.

    """
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm_patch.fp8_tp_padding.slices.linear_layout import linear_layout

    if blocks is None:
        return None
    layout = linear_layout(layer, blocks[isinstance(layer, RowParallelLinear)])
    if layout is None or not layout.is_cut:
        return None
    if envs.VLLM_FP8_TP_PADDING == OFF:
        return IS_OFF
    if blocks[0] != blocks[1]:
        return f"the blocks {list(blocks)} are not square. {SMALLER_TP}."
    return f"{type(layer).__name__} loads weights in a way of its own. {SMALLER_TP}."


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
        from vllm.model_executor.layers.linear import LinearBase

        if isinstance(layer, RoutedExperts):
            return self._experts_method(stock, config, layer, prefix)
        method = stock(config, layer, prefix)
        if not isinstance(layer, LinearBase):
            return method
        if why := cut_groups(method, layer):
            explain(method, prefix, why)
        return self.linear(layer, method)

    def _experts_method(self, stock: Callable, config, layer, prefix) -> Any:
        from vllm_patch.fp8_tp_padding.methods import experts

        blocks, moe = self.blocks(config), layer.moe_config
        if not experts.is_cut(blocks, moe):
            why = IS_OFF if experts.cuts_blocks(blocks, moe) else None
            return self._stock_experts(stock, config, layer, prefix, why)
        # Only vLLM knows whether it quantizes this layer, and it may refuse the
        # cut size before it says so: ask it about the padded one.
        with experts.cut_sizes(blocks, moe):
            method = stock(config, layer, prefix)
        extended = self.experts.get(type(method))
        is_of_format = extended is not None and method.weight_block_size == blocks
        if not is_of_format:
            why = f"it does not pad {type(method).__name__}. {SMALLER_TP}."
            return self._stock_experts(stock, config, layer, prefix, why)
        if experts.is_left_to_stock(blocks, layer):
            reason = experts.obstacle(blocks, layer)
            why = f"{reason}. {SMALLER_TP}, or expert parallelism."
            return self._stock_experts(stock, config, layer, prefix, why)
        return extended.made_of(method, layer)

    def _stock_experts(
        self, stock: Callable, config, layer, prefix, why: str | None
    ) -> Any:
        """Return vLLM's method, whose errors tell why it has cut experts."""
        with explained(prefix, why):
            method = stock(config, layer, prefix)
        if not isinstance(method, tuple(self.experts)):
            why = cut_groups(method, layer)
        if why:
            explain(method, prefix, why)
        return method


def cut_groups(method, layer) -> str | None:
    """Return why a layer was left whose scales belong to groups that are cut, and warn.

    Nobody pads them; outputs hold whole groups.
    """
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import RowParallelLinear

    if isinstance(layer, RoutedExperts):
        moe = layer.moe_config
        tp_size = 1 if moe.moe_parallel_config.use_ep else moe.tp_size
        layers, total = "Experts", moe.intermediate_size
    elif isinstance(layer, RowParallelLinear):
        layers, total, tp_size = "Row-parallel layers", layer.input_size, layer.tp_size
    else:
        return None
    found = _group(method, layer)
    if found is None or tp_size == 1 or total // tp_size % found[1] == 0:
        return None
    name, group = found
    logger.warning_once(
        "%s of %d / TP %d = %d columns cut the groups of %d of %s and are left to "
        "stock vLLM: only FP8 in blocks is padded.",
        *(layers, total, tp_size, total // tp_size, group, name),
    )
    return (
        f"it pads FP8 in blocks only, not groups of {group}. Use a tensor-parallel "
        "size that keeps groups whole, or expert parallelism."
    )


def _group(method, layer) -> tuple[str, int] | None:
    """Return what names a layer's groups, and their elements."""
    schemes = (getattr(each, "scheme", None) for each in (method, layer))
    for each in (method, *schemes, getattr(method, "wkey", None)):
        name = type(each).__name__
        for part, group in GROUPS.items():
            if part in name.lower():
                return name, group
    return None
