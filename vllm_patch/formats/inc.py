# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Intel's AutoRound (INC) with FP8 weights per block: linear layers."""

from vllm.model_executor.layers.quantization.inc.inc_linear import INCLinearMethod
from vllm.model_executor.layers.quantization.inc.schemes.inc_fp8_linear import (
    INCFp8LinearScheme,
)

from . import fp8
from .checkpoint_format import CheckpointFormat


def linear(layer, method):
    """Their scheme is a plain FP8 method in a wrapping."""
    is_scheme = type(method) is INCLinearMethod
    if is_scheme and type(method.scheme) is INCFp8LinearScheme:
        method.scheme.linear_method = fp8.linear(layer, method.scheme.linear_method)
    return method


FORMAT = CheckpointFormat(blocks=lambda config: None, experts={}, linear=linear)
