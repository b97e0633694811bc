# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compiles every variant of the masked kernels before requests come.

Triton compiles a kernel anew for other tiles, chunks of pairs and dtypes. vLLM's first
call of a layer is its profile run, with as many tokens as any call after it: the
workspace gets its size there. So a call with more tokens than all before it first runs
what fewer tokens would, once for each variant and on parts of its own tensors, which
needs no memory and leaves no dtype to guess.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from vllm.logger import init_logger

from .masked_moe import PairPlan, Routing, SortedPlan, Weights

logger = init_logger("vllm.fp8_tp_padding")

LOGGED_SECONDS = 2.0
Plan = PairPlan | SortedPlan
PlanOf = Callable[[int], Plan]

# Up to how many tokens all is compiled, by what else binaries depend on.
_warm: dict[Hashable, int] = {}


def warm_up(
    plan_of: PlanOf,
    out: torch.Tensor,
    x: torch.Tensor,
    weights: Weights,
    routing: Routing,
    workspace: torch.Tensor,
) -> int:
    """Compile what calls of up to ``len(x)`` tokens run.

    Args:
        plan_of: Returns the plan for a number of tokens.
        out: As of ``run``, like all that follow. It is overwritten.
        x: Input.
        weights: The experts.
        routing: Experts and weights of each token.
        workspace: For this many tokens.

    Returns:
        Up to how many tokens all is compiled; 0 where this call cannot tell.

    """
    if not _compiles(x):
        return 0
    most = len(x)
    key = _key(plan_of(most), x, routing)
    warm = _warm.get(key, 0)
    if warm >= most:
        return warm
    started = time.monotonic()
    plans = variants(plan_of, warm + 1, most)
    for plan in plans:
        part = slice(plan.problem.num_tokens)
        routed = replace(routing, weights=routing.weights[part], ids=routing.ids[part])
        plan.run(out[part], x[part], weights, routed, workspace)
    _warm[key] = most
    seconds = time.monotonic() - started
    if seconds > LOGGED_SECONDS:
        logger.info(
            "Compiled %d variants of the masked MoE kernels, for %d to %d tokens, in "
            "%.1f s.",
            *(len(plans), warm + 1, most, seconds),
        )
    return most


def variants(plan_of: PlanOf, fewest: int, most: int) -> list[Plan]:
    """Return one plan for each variant that these numbers of tokens take."""
    plans: dict[Hashable, Plan] = {}
    for num_tokens in range(fewest, most + 1):
        plan = plan_of(num_tokens)
        plans.setdefault(plan.variant, plan)
    return [*plans.values()]


def _compiles(x: torch.Tensor) -> bool:
    """Whether kernels compile for ``x``, and no CUDA graph records their launches."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


def _key(plan: Plan, x: torch.Tensor, routing: Routing) -> Hashable:
    dtypes = x.dtype, routing.ids.dtype, routing.weights.dtype
    return replace(plan.problem, num_tokens=0), dtypes, x.device
