# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Block-quantized FP8 layers at tensor-parallel sizes that cut a quant block.

This folder imports vLLM, torch and itself only, so that the same bytes work
inside the plugin and inside a vLLM source tree.

    shard.py          where a rank's slice lies on the checkpoint's block grid
    expert_loader.py  copies checkpoint expert tensors to that place, checked
    moe.py            the fork of Fp8MoEMethod that allocates the padded shapes
    engagement.py     the one log line that says what was padded
"""
