# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch check``: what tensor parallelism does to a model, before it is loaded.

    checkpoint     config.json and safetensors headers, or a hub's
    quantization   what the config says of formats, blocks and modules left out
    derived        tensors that a config implies, for want of headers
    layers         the layers that vLLM builds of them
    stock          what each release does with a layer
    ours           what this package does
    sizes          bytes on a rank
    verdict        all of it for one size, and the ways out
    report, plot   for people and machines

Each imports those above it, and none imports vLLM or torch.
"""

from vllm_patch.cli.check.command import add_parser

__all__ = ["add_parser"]
