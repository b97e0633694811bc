# SPDX-License-Identifier: Apache-2.0
"""The FP8 operators that this CPU's engine would run, against fp32.

``python -m vllm_patch.cli.cpu_fp8.check`` runs it with the operators of parity.
"""

import inspect

import torch

from vllm_patch.cli.cpu_fp8 import operators
from vllm_patch.cli.synthetic import fp8_blocks

BLOCK, EXPERTS, TOP_K, PADDED = 128, 4, 2, 64
# vLLM's operators take another way from five tokens on.
TOKENS = 1, 4, 5, 40
# Largest error of a token's row, relative to it: 2**-9 for each rounding to bfloat16.
# The dequantized weight and the output; of experts, two such weights, gate and up, what
# they become, an expert's output and the sum. Seen: 0.0030 of 0.0039, 0.0087 of 0.0117.
LIMITS = {"fp8_scaled_mm_cpu": 2 * 2**-9, "fused_experts_cpu": 6 * 2**-9}


def run() -> None:
    """Raise RuntimeError if vLLM refuses its operators on this CPU, or one is wrong."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    experts = cpu_moe.CPUExpertsFp8._supports_current_device()
    linear, reason = cpu.CPUFp8BlockScaledMMKernel.is_supported()
    if not (experts and linear):
        raise RuntimeError(
            "vLLM's checks refuse its FP8 operators on this CPU: of experts "
            f"{not experts}, of linear layers {not linear} ({reason})"
        )
    for tokens in TOKENS:
        draw = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, 2 * BLOCK, generator=draw).bfloat16()
        for name, errors in (
            ("fp8_scaled_mm_cpu", _linear_errors(x, draw)),
            ("fused_experts_cpu", [_experts_error(x, draw)]),
        ):
            if not max(errors) <= LIMITS[name]:
                raise RuntimeError(
                    f"{name} is wrong on this CPU: of {tokens} tokens, a row is "
                    f"{max(errors):.1e} from an fp32 reference, and "
                    f"{LIMITS[name]:.1e} is allowed"
                )


def _linear_errors(x: torch.Tensor, draw: torch.Generator) -> list[float]:
    """Return the errors without and with a bias."""
    weight, scale = _weights(draw, 3 * BLOCK, x.shape[1])
    packed = torch.ops._C.convert_weight_packed(weight)
    operator, block = torch.ops._C.fp8_scaled_mm_cpu, [BLOCK, BLOCK]
    expected = _product(x.float(), weight, scale)
    bias = torch.randn(len(weight), generator=draw)
    return [
        _error(operator(x, packed, scale, block, b, x.dtype, True), expected + added)
        for b, added in ((None, 0), (bias, bias))
    ]


def _experts_error(x: torch.Tensor, draw: torch.Generator) -> float:
    from vllm import _custom_ops

    hidden, size = x.shape[1], 2 * BLOCK
    w1, w1_scale = _stacked(draw, 2 * size, hidden)
    w2, w2_scale = _stacked(draw, hidden, size)
    scores = torch.rand(len(x), EXPERTS, generator=draw)
    topk_weights, topk_ids = scores.topk(TOP_K)
    expected = torch.zeros(x.shape)
    for expert in range(EXPERTS):
        gate, up = _product(x.float(), w1[expert], w1_scale[expert]).chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up
        share = (topk_weights * (topk_ids == expert)).sum(-1, keepdim=True)
        expected += share * _product(h, w2[expert], w2_scale[expert])
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
        "w1_zero": None,
        "w2_zero": None,
        "block_size": [BLOCK, BLOCK],
    }
    if hasattr(_custom_ops, "CPUActMethod"):
        arguments["act_method"] = _custom_ops.CPUActMethod.SILU_AND_MUL
    # Releases differ: a new tensor is returned, or ``out`` is written.
    names = inspect.signature(_custom_ops.fused_experts_cpu).parameters.keys()
    given = {name: arguments[name] for name in names & arguments.keys()}
    returned = _custom_ops.fused_experts_cpu(**given)
    return _error(arguments["out"] if returned is None else returned, expected)


def _stacked(draw: torch.Generator, *shape: int) -> list[torch.Tensor]:
    pairs = [_weights(draw, *shape) for _ in range(EXPERTS)]
    return [torch.stack(each) for each in zip(*pairs, strict=True)]


def _weights(draw: torch.Generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and its scales; zeros pad it at the ends, as at a cut block's."""
    weight, scale = fp8_blocks(draw, shape, BLOCK)
    weight[-PADDED:] = 0
    weight[:, -PADDED:] = 0
    return weight, scale


def _product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor):
    """Multiply block by block, each product scaled: no weight is dequantized."""
    rows, columns = scale.shape
    blocks = weight.float().reshape(rows, BLOCK, columns, BLOCK)
    x = x.reshape(len(x), columns, BLOCK)
    return torch.einsum("tcj,ricj,rc->tri", x, blocks, scale).flatten(1)


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    rows = (value.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return rows.max().item()


if __name__ == "__main__":
    operators.install()
    import vllm._custom_ops  # noqa: F401

    run()
