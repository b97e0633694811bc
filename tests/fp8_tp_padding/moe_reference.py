# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""All experts in float32, the readable way."""

import torch

from .experts import BLOCK, Checkpoint


def fake_quantize(x: torch.Tensor) -> torch.Tensor:
    """Round one activation group to FP8 and back, as vLLM does before a GEMM."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def groups_of_rank(start: int, size: int) -> list[slice]:
    """Cut a rank's columns where the checkpoint's blocks end."""
    cuts = [start, *range(-(-(start + 1) // BLOCK) * BLOCK, start + size, BLOCK)]
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], start + size], strict=True)]


def reference(
    checkpoint: Checkpoint,
    total: int,
    tp_size: int,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    biases: dict[str, torch.Tensor] | None = None,
    ranks: list[int] | None = None,
) -> torch.Tensor:
    """Sum over ``ranks`` (default: all), activations quantized in their groups.

    Args:
        checkpoint: The experts.
        total: Intermediate size of one expert, over all ranks.
        tp_size: Tensor-parallel size.
        x: ``[tokens, hidden]``.
        topk_weights: ``[tokens, top_k]``.
        topk_ids: ``[tokens, top_k]``; slots below 0 count nothing.
        biases: ``[experts, size]`` of each shard.
        ranks: Whose part of the sum to return.

    """
    count, hidden_size = checkpoint.weights["w1"].shape[0], x.shape[1]
    biases = biases or dict.fromkeys(("w1", "w3", "w2"), torch.zeros(count, 1))
    gate, up, down = (checkpoint.dequantized(shard) for shard in ("w1", "w3", "w2"))
    x = torch.cat([fake_quantize(g) for g in x.float().split(BLOCK, -1)], -1)
    size = total // tp_size
    out = torch.zeros(x.shape)
    for token, slot in torch.cartesian_prod(*map(torch.arange, topk_ids.shape)):
        expert = topk_ids[token, slot]
        if expert < 0:
            continue
        hidden = torch.nn.functional.silu(
            gate[expert] @ x[token] + biases["w1"][expert]
        )
        hidden *= up[expert] @ x[token] + biases["w3"][expert]
        result = biases["w2"][expert].expand(hidden_size).clone()
        for rank in range(tp_size) if ranks is None else ranks:
            for group in groups_of_rank(rank * size, size):
                result += down[expert][:, group] @ fake_quantize(hidden[group])
        out[token] += topk_weights[token, slot] * result
    return out


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.float() - expected).norm() / expected.norm()).item()
