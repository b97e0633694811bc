# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Block-quantized FP8 layers at tensor-parallel sizes that cut a quant block.

This folder imports vLLM (which brings Triton), torch and itself only, so that the
same bytes work inside the plugin and inside a vLLM source tree.

    shard.py             where a rank's slice lies on the checkpoint's block grid
    window.py            cuts that slice out of a tensor, with its padding
    tensor_check.py      what a checkpoint's tensors may be
    engagement.py        the one log line that says what was padded
    dependent_launch.py  lets a kernel start while the one before it ends

    moe.py               the fork of Fp8MoEMethod, for routed experts
    expert_loader.py     checkpoint tensors into its parameters
    expert_store.py      whether experts are stored with padding or without
    masked_experts.py    vLLM's Triton experts on a store without padding
    masked_moe.py        launches the kernels
    masked_kernels.py    the kernels
    tiles.py             their tile sizes, from configs/ or by a rule

    linear.py            the fork of Fp8LinearMethod
    linear_layout.py     the logical shards of vLLM's linear layers
    linear_loader.py     checkpoint tensors into its parameters
    input_quant.py       quantizes an input and pads it
    columns.py           moves columns in and out of padded tensors
    masked_linear.py     multiplies few tokens by the real rows only
"""
