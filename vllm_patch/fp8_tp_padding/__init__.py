# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Block-quantized FP8 layers at tensor-parallel sizes that cut a quant block.

This folder imports vLLM (which brings Triton), torch and itself only, so that the
same bytes work inside the plugin and inside a vLLM source tree.

    slices/    where a rank's slice lies on the checkpoint's grid of blocks
    loading/   how it gets from the checkpoint into a parameter
    kernels/   what multiplies it
    methods/   which method offers it to vLLM, by checkpoint format

Each imports those above it. The experts among kernels/ are vLLM's to choose: methods/
know them by a property, and import none.
"""
