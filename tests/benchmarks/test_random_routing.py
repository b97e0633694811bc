"""Tokens go to random experts, which the model's own router picks."""

import pytest
import torch

from benchmarks import random_routing
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

TOKENS, EXPERTS, TOP_K = 400, 64, 4


class Router(BaseRouter):
    routing_method_type = None

    def _compute_routing(self, hidden_states, router_logits, indices_type, **kwargs):
        assert len(hidden_states) == len(router_logits)
        return router_logits.topk(TOP_K)


@pytest.fixture
def routers(monkeypatch):
    monkeypatch.setattr(BaseRouter, "_select_experts", BaseRouter._select_experts)
    random_routing.route_at_random()
    return [Router(top_k=TOP_K, global_num_experts=EXPERTS) for _ in range(3)]


def chosen(router, tokens=TOKENS, dtype=torch.bfloat16):
    """What a router picks for tokens of which the model would send all to one."""
    logits = torch.zeros(tokens, EXPERTS, dtype=dtype)
    weights, ids = router._select_experts(torch.zeros(tokens, 8), logits)
    assert weights.dtype == dtype
    return ids


def test_experts_get_about_as_many(routers):
    ids = chosen(routers[0])
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    expected = TOKENS * TOP_K / EXPERTS
    assert counts.min() > 0.3 * expected and counts.max() < 2.5 * expected


def test_layers_choose_otherwise_and_each_the_same_again(routers):
    one, two, three = (chosen(router) for router in routers)
    assert not torch.equal(one, two) and not torch.equal(two, three)
    assert torch.equal(chosen(routers[1]), two)
    assert torch.equal(chosen(routers[1], tokens=7), two[:7])


def test_more_tokens_and_another_dtype(routers):
    chosen(routers[0], tokens=3)
    assert len(chosen(routers[2], tokens=5000)) == 5000
    assert len(chosen(routers[0], dtype=torch.float32)) == TOKENS
