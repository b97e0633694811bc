# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What multiplies a rank's slices.

fp8_quant.py         FP8 constants and the rounding rule of all kernels
dependent_launch.py  lets a kernel start while the one before it ends

masked_experts.py    vLLM's Triton experts on compact weights
masked_moe.py        launches the kernels: one plan for few tokens, one for many
masked_kernels.py    the kernels
workspace.py         where their intermediates lie
tiles.py             their tile sizes
tuned_tiles.py       ... read from configs/ or from vLLM's folder
tile_choice.py       ... chosen: the tuned ones, else a rule's

input_quant.py       quantizes a linear layer's input and pads it
columns.py           moves columns in and out of padded tensors
"""
