# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints' cut layers get methods of ours: a module for each config of vLLM.

A format says which of vLLM's methods it takes over, and names the ones of ours that
extend them. What they do with a slice is in ``fp8_tp_padding/methods/``.
"""
