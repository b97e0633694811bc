# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where a rank's slice lies on the checkpoint's grid of quant blocks."""
