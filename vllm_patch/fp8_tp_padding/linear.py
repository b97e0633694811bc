# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Block-FP8 linear layers for tensor-parallel sizes that cut a quant block."""

import torch

import vllm.envs as envs
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod

from . import engagement
from .columns import PaddedColumns, RealColumns
from .input_quant import PaddedQuantFP8, quantizing_kernel
from .linear_layout import LinearLayout, has_stock_loader, linear_layout
from .linear_loader import LinearParameter, check_loaded, padded_linear_loader
from .masked_linear import MaskedLinear, multiplies_real_rows
from .window import Window


def padded_layout(
    quant_config: Fp8Config, layer: torch.nn.Module
) -> LinearLayout | None:
    """Return the layout of a layer that is cut inside a quant block, else None."""
    blocks = quant_config.weight_block_size
    if blocks is None or blocks[0] != blocks[1]:
        return None
    layout = linear_layout(layer, blocks[0])
    if layout is None or not layout.is_cut or not has_stock_loader(layer):
        return None
    return None if envs.VLLM_FP8_TP_PADDING == "off" else layout


def padded_linear_method(
    quant_config: Fp8Config, layer: torch.nn.Module
) -> "Fp8TpPaddedLinearMethod | None":
    """Return the method for a layer that is cut inside a quant block, else None."""
    layout = padded_layout(quant_config, layer)
    return None if layout is None else Fp8TpPaddedLinearMethod(quant_config, layout)


@register_weight_loader_v2_supported_method
class Fp8TpPaddedLinearMethod(Fp8LinearMethod):
    """``Fp8LinearMethod`` whose rank holds whole blocks of the checkpoint's grid.

    Column-parallel layers pad each logical shard's rows and hand out the real
    columns of the output; row-parallel layers pad the columns, and their input
    with zeros to match. Each block keeps its scale.

    Args:
        quant_config: A block-quantized FP8 config.
        layout: The layer's slices, from ``padded_layout``.

    """

    def __init__(self, quant_config: Fp8Config, layout: LinearLayout):
        super().__init__(quant_config)
        self.layout = layout
        # To get_and_maybe_dequant_weights, with which MLA reads kv_b_proj, this says
        # that the stored weight is not the logical one: it then goes through apply().
        self.use_deep_gemm = True
        self._loaded: set[tuple[str, int]] = set()

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
        rows = sum(output_partition_sizes)
        self._set_sizes(layer, input_size_per_partition, rows)
        self._real_columns = RealColumns(outputs)
        self._choose_kernels(inputs)
        totals = [output.total for output in self.layout.outputs]
        block = self.weight_block_size[0]
        self._parameters = [
            LinearParameter("weight", "weight", outputs, inputs, totals, 1),
            LinearParameter(
                "weight_scale_inv",
                "scale",
                self.layout.output_blocks(),
                self.layout.input_blocks(),
                totals,
                block,
            ),
        ]
        for parameter in self._parameters:
            param = getattr(layer, parameter.name)
            param.weight_loader = padded_linear_loader(
                layer, extra_weight_attrs["weight_loader"], parameter, self._loaded
            )

        self._record(layer)

    def _choose_kernels(self, inputs: Window) -> None:
        """Decide where inputs are padded, and whether few tokens take their own."""
        self._pad = self._masked = None
        self._quantizing = quantizing_kernel(self.fp8_linear, inputs)
        if self._quantizing is None:
            self._pad = PaddedColumns(inputs) if self.layout.pads_input else None
            return
        quant_fp8 = PaddedQuantFP8(self._quantizing.quant_fp8, inputs)
        self._quantizing.quant_fp8 = quant_fp8
        if self.layout.pads_input:
            return
        if multiplies_real_rows(self._real_columns.total, inputs.span):
            out_dtype = self.fp8_linear.config.out_dtype
            self._masked = MaskedLinear(self._real_columns, quant_fp8, out_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        engagement.report(layer.tp_rank)
        try:
            check_loaded(layer, self._parameters, self._loaded)
        finally:
            self._loaded.clear()
        if self.use_marlin:
            # Marlin takes its sizes from the layer, now and in each call.
            rows = sum(window.span for window in self.layout.output_windows())
            self._set_sizes(layer, self.layout.input_window().span, rows)
        bias = layer.bias
        if not self.layout.pads_input:
            # Marlin would permute it for the padded output; apply() adds it later.
            layer.bias = None
        super().process_weights_after_loading(layer)
        if not self.layout.pads_input:
            layer.bias = bias

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.layout.pads_input:
            return self._product(layer, x, bias)
        if self._masked is not None:
            weights = layer.weight, layer.weight_scale_inv
            if self._masked.takes(x, *weights):
                return self._masked(x, *weights, bias)
        return self._real_columns(self._product(layer, x), bias)

    def _product(self, layer, x, bias=None) -> torch.Tensor:
        """Multiply with the padded weight.

        With the kernel whose input we quantize, if there is one, but for columns
        under torch.compile: they need no padded input, and launch what stock does.
        """
        if self._pad is not None:
            x = self._pad(x)
        is_stock = torch.compiler.is_compiling() and not self.layout.pads_input
        if self._quantizing is None or is_stock:
            return super().apply(layer, x, bias)
        return self._quantizing.apply_weights(layer, x, bias)

    def _record(self, layer: torch.nn.Module) -> None:
        rows, columns = layer.weight.shape
        layout = self.layout
        cut = [layout.input] if layout.pads_input else layout.outputs
        name = layer.prefix.rpartition(".")[2] or type(layer).__name__
        for dimension in {d: None for d in cut if d.is_cut}:
            size = engagement.PaddedSize(
                name, dimension.total, dimension.block, dimension.tp_size
            )
            shards = [d for d in cut if d == dimension]
            bytes_each = rows if layout.pads_input else columns
            engagement.record(size, len(shards) * bytes_each)

    @staticmethod
    def _set_sizes(layer: torch.nn.Module, columns: int, rows: int) -> None:
        layer.input_size_per_partition = columns
        layer.output_size_per_partition = rows
