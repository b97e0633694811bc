# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""LoRA adapters on padded experts, in vLLM's own LoRA layers."""

import pytest
import torch

from . import experts
from .experts import BLOCK, Checkpoint, poison
from .moe_reference import reference, relative_error
from .tensor_parallel import rank_of, runs_kernels
from .test_moe_forward import EXPERTS, HIDDEN, TOKENS, routing

pytestmark = runs_kernels

RANK = 8
# A block and a half; five blocks on eight ranks, straddled; eleven, odd leads.
TOTALS = (1536, 640, 1408)
TP = 8


class TorchPunica:
    """The two products of ``PunicaWrapperGPU`` that experts ask for, in torch."""

    def add_lora_w13(self, y, x, lora_a, lora_b, topk_ids, topk_weights, *_, **__):
        self.ids, self.weights = topk_ids, topk_weights
        widths = [b.shape[2] for b in lora_b]
        for part, a, b in zip(y.split(widths, -1), lora_a, lora_b, strict=True):
            for token, slot in torch.cartesian_prod(*map(torch.arange, topk_ids.shape)):
                expert = topk_ids[token, slot]
                part[token, slot] += b[0, expert] @ (a[0, expert] @ x[token])
        return None, None, None, None

    def add_lora_w2(self, y, x, lora_a, lora_b, *_, **__):
        x = x.view(*self.ids.shape, -1)
        for token, slot in torch.cartesian_prod(*map(torch.arange, self.ids.shape)):
            expert, weight = self.ids[token, slot], self.weights[token, slot]
            product = lora_b[0][0, expert] @ (lora_a[0][0, expert] @ x[token, slot])
            y[token, slot] += weight * product


def adapter(total: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the factors of each projection, as large as the weights' products."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"w1": (HIDDEN, total), "w2": (total, HIDDEN), "w3": (HIDDEN, total)}
    return {
        name: (
            torch.randn(EXPERTS, RANK, columns, generator=generator) / 16,
            torch.randn(EXPERTS, rows, RANK, generator=generator) / 16,
        )
        for name, (columns, rows) in shapes.items()
    }


def fused(factors):
    """Return them as 3-D models do: gate and up in one."""
    (gate_a, gate_b), down, (_, up_b) = factors.values()
    return {"w13": (gate_a, torch.cat([gate_b, up_b], 1)), "w2": down}


LAYOUTS = {"FusedMoEWithLoRA": dict, "FusedMoE3DWithLoRA": fused}


class Model:
    architectures = ("SomeForCausalLM",)


def wrapped(checkpoint, total, tp_size, rank, name):
    """Return vLLM's LoRA layer around loaded experts of one rank."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import fused_moe

    sizes = {"experts": EXPERTS, "hidden": HIDDEN, "dtype": torch.float32}
    runner = experts.runner(total, tp_size, rank, lora=True, **sizes)
    poison(runner.routed_experts)
    experts.load(runner.routed_experts, checkpoint)
    experts.process(runner.routed_experts, tp_size, rank, torch.float32)
    config = LoRAConfig(max_lora_rank=RANK, max_loras=1, lora_dtype=torch.float32)
    with rank_of(tp_size, rank, torch.float32):
        lora = getattr(fused_moe, name)(runner)
        lora.create_lora_weights(1, config, Model)
        lora.set_mapping(TorchPunica())
    return lora


def set_lora(lora, factors):
    lora.set_lora(0, *([pair[i] for pair in factors.values()] for i in range(2)))


def output(lora, tp_size, rank):
    x, weights, ids = routing()
    layer = lora.base_layer.routed_experts
    with rank_of(tp_size, rank, torch.float32):
        return lora._moe_kernel.apply(
            x,
            layer.w13_weight,
            layer.w2_weight,
            weights,
            ids,
            activation=layer.activation,
            global_num_experts=EXPERTS,
            apply_router_weight_on_input=False,
            expert_map=None,
        )


def sum_of_ranks(checkpoint, total, tp_size, name, factors):
    summed = torch.zeros(TOKENS, HIDDEN)
    for rank in range(tp_size):
        lora = wrapped(checkpoint, total, tp_size, rank, name)
        if factors:
            set_lora(lora, factors)
        summed += output(lora, tp_size, rank)
    return summed


@pytest.mark.parametrize("name", LAYOUTS)
def test_adapters_do_what_they_do_on_one_rank(name):
    """But for the groups that activations are quantized in, and bfloat16 in between."""
    checkpoint = Checkpoint.exact(640, experts=EXPERTS, hidden=HIDDEN)
    factors = LAYOUTS[name](adapter(640))
    stock = sum_of_ranks(checkpoint, 640, 1, name, factors)
    plain = sum_of_ranks(checkpoint, 640, 1, name, None)
    assert relative_error(plain, stock) > 0.3, "the adapter must count"
    cut = sum_of_ranks(checkpoint, 640, TP, name, factors)
    assert relative_error(cut, stock) < 3e-2


def test_experts_without_an_adapter_compute_what_they_do_without_lora():
    checkpoint = Checkpoint.exact(640, experts=EXPERTS, hidden=HIDDEN)
    summed = sum_of_ranks(checkpoint, 640, TP, "FusedMoEWithLoRA", None)
    expected = reference(checkpoint, 640, TP, *routing())
    assert relative_error(summed, expected.value) < 3e-2


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_hold_an_adapter_where_their_weights_are(name, total):
    """Exactly, between zeros; after vLLM's dummies, and another adapter."""
    checkpoint = Checkpoint.random(total, experts=EXPERTS, hidden=HIDDEN)
    factors = adapter(total)
    size = total // TP
    for rank in range(TP):
        lora = wrapped(checkpoint, total, TP, rank, name)
        real = slice(rank * size % BLOCK, rank * size % BLOCK + size)
        mine = slice(rank * size, rank * size + size)
        set_lora(lora, LAYOUTS[name](dummy(lora)))
        for scale in (1, 3):
            wanted = {n: (scale * a, scale * b) for n, (a, b) in factors.items()}
            set_lora(lora, LAYOUTS[name](wanted))
            down = torch.zeros_like(lora.w2_lora_a_stacked[0][0])
            down[..., real] = wanted["w2"][0][..., mine]
            assert torch.equal(lora.w2_lora_a_stacked[0][0], down)
            held = [
                half
                for b in lora.w13_lora_b_stacked
                for half in b[0].split(lora.intermediate_size_per_partition, 1)
            ]
            for half, projection in zip(held, ("w1", "w3"), strict=True):
                expected = torch.zeros_like(half)
                expected[:, real] = wanted[projection][1][:, mine]
                assert torch.equal(half, expected)


def dummy(lora):
    """Return factors that vLLM warms up with: zeros, in sizes of its buffers."""
    size = TP * lora.intermediate_size_per_partition
    pairs = adapter(size).items()
    return {n: (torch.zeros_like(a), torch.zeros_like(b)) for n, (a, b) in pairs}
