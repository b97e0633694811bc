# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_patch.cli.cpu_fp8.check FILE``: the operators against fp32.

To be run with ``cpu_fp8.environment()``, as the engine is. Writes a JSON object: which
operators this CPU gets, and how far each is from an fp32 reference.
"""

import inspect
import json
import sys
from pathlib import Path

import torch

from vllm_patch.cli.cpu_fp8.operators import choose

BLOCK, TOKENS, EXPERTS, TOP_K = 128, 40, 4, 2
# Activations, intermediate and output are bfloat16: each rounds by up to 2**-9. A
# wrong scale is off by a factor, here 10.
LIMIT = 2**-6


def errors() -> dict[str, float]:
    """Return the largest relative error of a token's row, by operator."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, 2 * BLOCK, generator=draw).bfloat16()
    return {
        "fp8_scaled_mm_cpu": _linear_error(x, draw),
        "fused_experts_cpu": _experts_error(x, draw),
    }


def _linear_error(x: torch.Tensor, draw: torch.Generator) -> float:
    weight, scale = _random(draw, 3 * BLOCK, x.shape[1])
    expected = _product(x.float(), weight, scale)
    packed = torch.ops._C.convert_weight_packed(weight)
    block = [BLOCK, BLOCK]
    operator = torch.ops._C.fp8_scaled_mm_cpu
    return _error(operator(x, packed, scale, block, None, x.dtype, True), expected)


def _experts_error(x: torch.Tensor, draw: torch.Generator) -> float:
    from vllm import _custom_ops

    hidden, size = x.shape[1], 2 * BLOCK
    w1, w1_scale = _random(draw, EXPERTS, 2 * size, hidden)
    w2, w2_scale = _random(draw, EXPERTS, hidden, size)
    scores = torch.rand(TOKENS, EXPERTS, generator=draw)
    topk_weights, topk_ids = scores.topk(TOP_K)
    expected = torch.zeros(TOKENS, hidden)
    for token in range(TOKENS):
        for expert, weight in zip(topk_ids[token], topk_weights[token], strict=True):
            row = x[token : token + 1].float()
            gate, up = _product(row, w1[expert], w1_scale[expert]).chunk(2, -1)
            h = torch.nn.functional.silu(gate) * up
            expected[token] += weight * _product(h, w2[expert], w2_scale[expert])[0]
    pack = torch.ops._C.convert_weight_packed
    arguments = {
        "out": torch.empty_like(x),
        "hidden_states": x,
        "w1": pack(w1),
        "w2": pack(w2),
        "topk_weights": topk_weights,
        "topk_ids": topk_ids.int(),
        "inplace": False,
        "moe_comp_method": _custom_ops.CPUQuantMethod.FP8_W8A16,
        "w1_scale": w1_scale,
        "w2_scale": w2_scale,
        "block_size": [BLOCK, BLOCK],
    }
    if hasattr(_custom_ops, "CPUActMethod"):
        arguments["act_method"] = _custom_ops.CPUActMethod.SILU_AND_MUL
    # Releases differ: a new tensor is returned, or ``out`` is written.
    names = inspect.signature(_custom_ops.fused_experts_cpu).parameters
    given = {name: arguments.get(name) for name in names if name in arguments}
    missing = {"w1_zero", "w2_zero"} & names.keys()
    given |= dict.fromkeys(missing)
    returned = _custom_ops.fused_experts_cpu(**given)
    return _error(arguments["out"] if returned is None else returned, expected)


def _random(draw: torch.Generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return FP8 weights and block scales; neighbouring blocks differ 10x in scale."""
    weight = torch.randn(shape, generator=draw).to(torch.float8_e4m3fn)
    *stacked, rows, columns = shape[:-2] + (shape[-2] // BLOCK, shape[-1] // BLOCK)
    odd = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 1
    scale = torch.where(odd, 10.0, 1.0) / 100
    return weight, scale.expand(*stacked, rows, columns).contiguous()


def _product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor):
    """Multiply block by block, each product scaled: no weight is dequantized."""
    rows, columns = scale.shape
    y = torch.zeros(len(x), rows, BLOCK)
    blocks = weight.float().reshape(rows, BLOCK, columns, BLOCK)
    for row in range(rows):
        for column in range(columns):
            part = x[:, column * BLOCK : (column + 1) * BLOCK]
            y[:, row] += scale[row, column] * (part @ blocks[row, :, column].T)
    return y.flatten(1)


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    rows = (value.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return rows.max().item()


if __name__ == "__main__":
    import vllm._custom_ops  # noqa: F401

    found = {"operators": choose().value, "limit": LIMIT, "errors": errors()}
    Path(sys.argv[1]).write_text(json.dumps(found))
