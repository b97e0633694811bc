"""Routes tokens at random, in the time that a model's own router takes."""

from typing import Any

import torch

# Layers choose by other rows of the same logits.
OFFSETS, STEP = 1024, 37


def route_at_random() -> None:
    """Make all routers of this process choose by random logits, with their kernels.

    vLLM's simulation (``VLLM_MOE_ROUTING_SIMULATION_STRATEGY``) draws scores and sorts
    them in each layer: several launches where a router has one. Here logits are drawn
    once, the same in each process; a step of as many tokens goes to the same experts
    again.
    """
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    stock = BaseRouter._select_experts
    drawn: dict[tuple, torch.Tensor] = {}
    starts: dict[int, int] = {}

    def select_experts(self, hidden_states, router_logits, *args, **kwargs):
        start = starts.setdefault(id(self), STEP * len(starts) % OFFSETS)
        logits = _logits_like(router_logits, drawn)[start : start + len(router_logits)]
        return stock(self, hidden_states, logits, *args, **kwargs)

    BaseRouter._select_experts = select_experts


def _logits_like(logits: torch.Tensor, drawn: dict[tuple, Any]) -> torch.Tensor:
    """Return at least ``OFFSETS`` rows more than ``logits`` has.

    Engines start with as many tokens as they ever run, before they capture graphs.
    """
    tokens, experts = logits.shape
    kind = experts, logits.dtype, logits.device
    if kind not in drawn or len(drawn[kind]) < tokens + OFFSETS:
        generator = torch.Generator(logits.device).manual_seed(0)
        drawn[kind] = torch.randn(
            *(tokens + OFFSETS, experts),
            dtype=logits.dtype,
            device=logits.device,
            generator=generator,
        )
    return drawn[kind]
