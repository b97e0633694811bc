# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a rank's slices get from a checkpoint into its parameters.

sliced_tensor.py  checks, loads and judges one tensor; knows which of a layer came
expert_loader.py  called as vLLM calls the loaders of routed experts
linear_loader.py  called as vLLM calls the loaders of linear layers
"""
