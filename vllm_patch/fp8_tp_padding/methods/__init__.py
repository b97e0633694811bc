# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which methods vLLM gets for layers that are cut inside a quant block."""
