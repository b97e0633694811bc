# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Block-quantized FP8 layers at tensor-parallel sizes that cut a quant block.

This folder imports vLLM, torch and itself only, so that the same bytes work
inside the plugin and inside a vLLM source tree.

    shard.py          where a rank's slice lies on the checkpoint's block grid
    window.py         cuts that slice out of a tensor, with its padding
    moe.py            the fork of Fp8MoEMethod, for routed experts
    expert_loader.py  checkpoint tensors into its parameters
    linear.py         the fork of Fp8LinearMethod
    linear_layout.py  the logical shards of vLLM's linear layers
    linear_loader.py  checkpoint tensors into its parameters
    input_quant.py    quantizes the input of linear layers, and pads it
    columns.py        real columns out of padded outputs; inputs into padded ones
    tensor_check.py   what a checkpoint's tensors may be
    engagement.py     the one log line that says what was padded
"""
