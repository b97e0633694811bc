# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which methods vLLM gets for layers that are cut inside a quant block.

All that a checkpoint's format decides is here: its config, and what tensors are called.
A format of another vLLM class needs a method of its own, and a way to it.
"""
