# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's methods for linear layers that are cut inside a quant block."""

from collections.abc import Sequence

import torch
from typing_extensions import Self

import vllm.envs as envs
from vllm.model_executor.kernels.linear import (
    HummingFP8ScaledMMLinearKernel,
    MarlinFP8ScaledMMLinearKernel,
    MMLinearKernel,
)
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from vllm.platforms import current_platform

from ..kernels.columns import PaddedColumns, RealColumns
from ..kernels.input_quant import PaddedQuantFP8, quantizing_kernel
from ..loading.linear_loader import linear_loader, linear_tensors
from ..loading.sliced_tensor import SlicedTensor, SlicedTensors
from ..slices.linear_layout import LinearLayout, has_stock_loader, linear_layout
from ..slices.window import Window
from . import engagement
from .store import Padded

# They take their sizes from the layer, where LoRA reads the real ones.
READ_SIZES = (HummingFP8ScaledMMLinearKernel, MarlinFP8ScaledMMLinearKernel)


def cut_layout(
    blocks: Sequence[int] | None, layer: torch.nn.Module
) -> LinearLayout | None:
    """Return the layout of a layer that is cut inside a quant block, else None."""
    if blocks is None or blocks[0] != blocks[1]:
        return None
    layout = linear_layout(layer, blocks[0])
    if layout is None or not layout.is_cut or not has_stock_loader(layer):
        return None
    return None if envs.VLLM_FP8_TP_PADDING == "off" else layout


def cut_linear_method(
    quant_config: Fp8Config, layer: torch.nn.Module
) -> "CutFp8LinearMethod | None":
    """Return the method for a layer that is cut inside a quant block, else None."""
    layout = cut_layout(quant_config.weight_block_size, layer)
    if layout is None:
        return None
    return CutFp8LinearMethod.made_of(Fp8LinearMethod(quant_config), layout)


def _set_sizes(layer, columns: int, outputs: list[int]) -> None:
    layer.input_size_per_partition = columns
    layer.output_size_per_partition = sum(outputs)
    layer.output_partition_sizes = outputs


class PaddedLayer:
    """A layer to a kernel that reads the sizes of its weight from it."""

    def __init__(self, layer: torch.nn.Module, columns: int, outputs: list[int]):
        self._layer = layer
        _set_sizes(self, columns, outputs)

    def __getattr__(self, name: str):
        return getattr(self._layer, name)


class CutLinear:
    """What methods for cut layers have in common, beside one of vLLM's own.

    A rank holds whole blocks of the checkpoint's grid. Column-parallel layers pad each
    logical shard's rows and hand out the real columns of the output; row-parallel
    layers pad the columns, and their input with zeros to match. Each block keeps its
    scale.

    Attributes:
        layout: The layer's slices, from ``cut_layout``.
        scale_name: Name of the parameter that holds block scales.

    """

    layout: LinearLayout
    scale_name: str

    @classmethod
    def made_of(cls, method: LinearMethodBase, layout: LinearLayout) -> Self:
        """Return a method that vLLM made, as one of ours: only the class changes."""
        cut = object.__new__(cls)
        vars(cut).update(vars(method))
        cut.layout = layout
        return cut

    def chosen_kernel(self, layer: torch.nn.Module) -> MMLinearKernel:
        """Return the kernel that vLLM chose for the layer when it made weights."""
        raise NotImplementedError

    def sliced_tensors(self) -> list[SlicedTensor]:
        """Return what the layer loads."""
        return linear_tensors(self.layout, self.scale_name)

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ):
        outputs = self.layout.output_windows()
        inputs = self.layout.input_window()
        super().create_weights(
            layer,
            inputs.span,
            [window.span for window in outputs],
            inputs.span,
            sum(window.span for window in outputs),
            params_dtype,
            **extra_weight_attrs,
        )
        # The real ones, by which vLLM allocates the bias.
        layer.logical_widths = output_partition_sizes
        _set_sizes(layer, input_size_per_partition, output_partition_sizes)
        self._real_columns = RealColumns(outputs)
        self._choose_kernel(layer, inputs)
        sliced = self.sliced_tensors()
        self._tensors = SlicedTensors(layer.prefix, sliced, experts=None)
        stock_loader = extra_weight_attrs["weight_loader"]
        for name in {tensor.parameter: None for tensor in sliced}:
            getattr(layer, name).weight_loader = linear_loader(
                layer, stock_loader, self._tensors, name, self.layout
            )
        self._record(layer)

    def _choose_kernel(self, layer: torch.nn.Module, inputs: Window) -> None:
        """Decide where inputs are padded: while they are quantized, or before."""
        self._pad = None
        kernel = self.chosen_kernel(layer)
        self._padded_sizes = None
        if isinstance(kernel, READ_SIZES):
            outputs = [window.span for window in self.layout.output_windows()]
            self._padded_sizes = inputs.span, outputs
        self._quantizing = quantizing_kernel(kernel, inputs)
        if self._quantizing is not None:
            quant_fp8 = PaddedQuantFP8(self._quantizing.quant_fp8, inputs)
            self._quantizing.quant_fp8 = quant_fp8
        elif self.layout.pads_input:
            self._pad = PaddedColumns(inputs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        engagement.report(layer.tp_rank)
        self._tensors.check_loaded(layer)
        real = layer.input_size_per_partition, layer.output_partition_sizes
        if self._padded_sizes is not None:
            _set_sizes(layer, *self._padded_sizes)
        bias, has_bias = layer.bias, layer.has_bias
        if not self.layout.pads_input:
            # Kernels would permute it for the padded output; apply() adds it later.
            layer.bias, layer.has_bias = None, False
        super().process_weights_after_loading(layer)
        _set_sizes(layer, *real)
        if not self.layout.pads_input:
            layer.bias, layer.has_bias = bias, has_bias
        is_read_by_mla = getattr(layer, "_cpu_skip_gemm_dispatch", False)
        if is_read_by_mla and current_platform.is_cpu():
            # MLA's kernels for AMX take a weight with blocks from kv_b_proj as it is
            # stored; one without, by way of apply().
            layer.weight_block_size = None

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.layout.pads_input:
            return self._product(layer, x, bias)
        return self._real_columns(self._product(layer, x), bias)

    def _product(self, layer, x, bias=None) -> torch.Tensor:
        """Multiply with the padded weight.

        With the kernel whose input we quantize, if there is one, but for columns
        under torch.compile: they need no padded input, and launch what stock does.
        """
        if self._pad is not None:
            x = self._pad(x)
        if self._padded_sizes is not None:
            layer = PaddedLayer(layer, *self._padded_sizes)
        is_stock = torch.compiler.is_compiling() and not self.layout.pads_input
        if self._quantizing is None or is_stock:
            return super().apply(layer, x, bias)
        return self.multiplied(self._quantizing, layer, x, bias)

    def multiplied(self, kernel, layer, x, bias) -> torch.Tensor:
        """Return the product by a kernel, as vLLM's method calls one."""
        return kernel.apply_weights(layer, x, bias)

    def _record(self, layer: torch.nn.Module) -> None:
        rows, columns = layer.weight.shape
        layout = self.layout
        cut = [layout.input] if layout.pads_input else layout.outputs
        name = layer.prefix.rpartition(".")[2] or type(layer).__name__
        for dimension in {d: None for d in cut if d.is_cut}:
            size = engagement.CutSize(
                name, dimension.total, dimension.block, dimension.tp_size, Padded()
            )
            shards = [d for d in cut if d == dimension]
            bytes_each = rows if layout.pads_input else columns
            engagement.record(size, len(shards) * bytes_each)


@register_weight_loader_v2_supported_method
class CutFp8LinearMethod(CutLinear, Fp8LinearMethod):
    """``Fp8LinearMethod`` on the checkpoint's grid of quant blocks."""

    scale_name = "weight_scale_inv"

    @classmethod
    def made_of(cls, method: Fp8LinearMethod, layout: LinearLayout) -> Self:
        cut = super().made_of(method, layout)
        # Tells get_and_maybe_dequant_weights to read the weight through apply(): MLA
        # reads kv_b_proj by it, and the stored weight is not the logical one. vLLM has
        # one signal for that: a layout of scales that only DeepGEMM reads.
        cut.use_deep_gemm = True
        return cut

    def chosen_kernel(self, layer: torch.nn.Module) -> MMLinearKernel:
        return self.fp8_linear
