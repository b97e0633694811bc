"""A column-parallel layer and what vLLM's models do next, as torch.compile sees them.

An engine compiles layers together with what is around them, so that taking the real
columns out of a padded output can become part of the kernel that reads them.
"""

from collections.abc import Callable

import torch

from benchmarks.linear_cases import QKV, Case

MAX_POSITIONS = 8192
# Each layer is compiled for one token and for any other number.
COMPILATIONS = 1000


Forward = Callable[[torch.Tensor, dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]


def forward(case: Case, layer: torch.nn.Module) -> Forward:
    """Return a call of ``x`` and the layer's parameters by name.

    Args:
        case: The layer, before its sizes are rounded up for the control.
        layer: Loaded.

    """
    after = _rotary(case, layer) if case.kind == QKV else _silu_and_mul

    def call(x, of_layer):
        output, _ = torch.func.functional_call(layer, of_layer, (x,))
        return after(output)

    return call


def compiled(call: Forward) -> Forward:
    torch._dynamo.config.recompile_limit = COMPILATIONS
    torch._dynamo.config.accumulated_recompile_limit = COMPILATIONS
    return torch.compile(call, fullgraph=True)


def parameters(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in layer._parameters.items() if p is not None}


def _silu_and_mul(gate_up: torch.Tensor) -> tuple[torch.Tensor]:
    gate, up = gate_up.chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up,)


def _rotary(case: Case, layer: torch.nn.Module):
    """Return what rotates queries and keys; values stay a part of the output."""
    device = layer.weight.device
    cos, sin = torch.rand(2, MAX_POSITIONS, 1, case.head // 2, device=device)

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        tokens = heads.shape[0]
        first, second = heads.unflatten(-1, (-1, case.head)).float().chunk(2, -1)
        c, s = cos[:tokens], sin[:tokens]
        turned = torch.cat([first * c - second * s, second * c + first * s], -1)
        return turned.to(heads.dtype).flatten(-2)

    def after(qkv: torch.Tensor):
        sizes = layer.logical_widths
        q, k, v = qkv.split(sizes, -1)
        return rotated(q), rotated(k), v

    return after
