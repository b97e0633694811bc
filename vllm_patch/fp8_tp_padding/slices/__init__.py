# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where a rank's slice lies on the checkpoint's grid of quant blocks.

shard.py          the slice of one dimension: lead, span, blocks
window.py         cuts it out of a tensor, with its padding
linear_layout.py  the slices of vLLM's linear layers: q, k, v; gate, up; ...
"""
