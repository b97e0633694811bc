# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which methods vLLM gets for layers that are cut inside a quant block.

experts.py     the fork of Fp8MoEMethod, for routed experts
linear.py      the fork of Fp8LinearMethod
store.py       compact or padded: how a layer's weights are stored, and why
engagement.py  the one log line that says which layers were cut
"""
