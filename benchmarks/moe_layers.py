"""Real vLLM experts of one rank with random weights, and their fp32 reference."""

import itertools
import os
from dataclasses import dataclass
from unittest import mock

import torch

from benchmarks import checkpoint as checkpoints
from benchmarks.checkpoint import Checkpoint
from benchmarks.linear_cases import Quantized
from benchmarks.moe_cases import Case
from benchmarks.one_rank import rank_of
from benchmarks.quantized import (
    BLOCK,
    FP8,
    dequantized,
    fake_quantize,
    normal,
    random_scales,
)

# Of ``swiglustep`` in vLLM's Triton experts.
STEP_LIMIT = 7.0
# Where vLLM keeps a checkpoint's gate, down and up.
SHARDS = {"w1": "w13_weight", "w2": "w2_weight", "w3": "w13_weight"}


@dataclass(frozen=True)
class Routing:
    """Where the router sends tokens: ``[num_tokens, top_k]`` weights and ids."""

    weights: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def random(cls, case: Case, num_tokens: int, generator: torch.Generator):
        """Return the top-k of random logits, their softmax renormalized."""
        return cls._top(case, normal(num_tokens, case.experts, generator=generator))

    @classmethod
    def skewed(cls, case: Case, num_tokens: int, generator: torch.Generator):
        """Send all tokens to ``2 * top_k`` experts, more to some than to others."""
        logits = normal(num_tokens, case.experts, generator=generator)
        favour = normal(case.experts, generator=generator)
        favour[favour.topk(2 * case.top_k).indices] += 100
        return cls._top(case, logits + favour)

    @classmethod
    def _top(cls, case: Case, logits: torch.Tensor):
        top, ids = logits.topk(case.top_k, -1)
        return cls(top.softmax(-1), ids.to(torch.int32))

    def worst_rank_first(self, experts: int, ep_size: int) -> "Routing":
        """Rename experts so that those of the worst-loaded rank come first."""
        local = experts // ep_size
        loads = torch.bincount(self.ids.flatten() // local, minlength=ep_size)
        first = int(loads.argmax()) * local
        return Routing(self.weights, (self.ids - first) % experts)


@dataclass(frozen=True)
class Arithmetic:
    """What a kernel computes, and where it rounds, besides its FP8 weights.

    Attributes:
        activation: Of the case.
        limit: ``swiglu_limit`` of the case.
        gate_up: It keeps their products in bfloat16.
        silu: It rounds the activated gate to bfloat16 before it multiplies by up.
        h: It keeps the product in bfloat16.
        powers_of_two: It rounds the scales of activations up to powers of two, as
            vLLM's Triton experts do where DeepGEMM is on.

    """

    activation: str
    limit: float | None
    gate_up: bool
    silu: bool
    h: bool
    powers_of_two: bool

    @classmethod
    def ours(cls, case: Case) -> "Arithmetic":
        what = case.activation, case.swiglu_limit
        return cls(*what, gate_up=False, silu=False, h=True, powers_of_two=False)

    @classmethod
    def stock(cls, case: Case, block: int, device: torch.device) -> "Arithmetic":
        rounds = _rounds_scales(device)
        what = case.activation, case.swiglu_limit
        # Else vLLM multiplies and quantizes in one kernel, in float32.
        apart = rounds or block != BLOCK or what != ("silu", None)
        return cls(*what, gate_up=True, silu=apart, h=apart, powers_of_two=rounds)

    def __str__(self) -> str:
        return "powers of two" if self.powers_of_two else "exact"

    def quantized(self, x: torch.Tensor, block: int) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, block))
        return fake_quantize(groups, -1, self.powers_of_two).flatten(-2)

    def intermediate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.gate_up:
            gate, up = gate.bfloat16().float(), up.bfloat16().float()
        active, up = self.activated(gate, up)
        h = (active.bfloat16().float() if self.silu else active) * up
        return h.bfloat16().float() if self.h else h

    def activated(
        self, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two factors of the intermediate."""
        if self.activation == "gelu_tanh":
            return torch.nn.functional.gelu(gate, approximate="tanh"), up
        silu = torch.nn.functional.silu
        if self.activation == "swiglustep":
            return silu(gate).clamp(max=STEP_LIMIT), up.clamp(-STEP_LIMIT, STEP_LIMIT)
        if self.limit is None:
            return silu(gate), up
        return silu(gate.clamp(max=self.limit)), up.clamp(-self.limit, self.limit)


def _rounds_scales(device: torch.device) -> bool:
    """Whether vLLM's quantization, as its Triton experts call it, rounds scales."""
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    x = torch.randn(64, BLOCK, device=device, dtype=torch.bfloat16)
    _, scales = fp8_utils.per_token_group_quant_fp8(x, BLOCK)
    return bool((scales.float().log2() % 1 == 0).all())


@dataclass(frozen=True)
class Weights:
    """A layer's weights before vLLM prepares them for its kernel.

    Attributes:
        w13: FP8 ``[experts, 2 * columns, hidden]``, gate then up.
        w2: FP8 ``[experts, hidden, columns]``.
        w13_scale: ``[experts, 2 * blocks, hidden / block]``.
        w2_scale: ``[experts, hidden / block, blocks]``.
        lead: Position of the first column inside its quant block.

    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    lead: int

    @property
    def block(self) -> int:
        """Size of a quant block: 128, or less where vLLM refines it."""
        return self.w13.shape[-1] // self.w13_scale.shape[-1]

    @property
    def nbytes(self) -> int:
        scales = self.w13_scale.nbytes + self.w2_scale.nbytes
        return self.w13.nbytes + self.w2.nbytes + scales

    def reference(
        self, x: torch.Tensor, routing: Routing, arithmetic: Arithmetic
    ) -> torch.Tensor:
        """Compute the layer in fp32, rounded where ``arithmetic`` rounds.

        Experts that are not here, as under expert parallelism, add nothing.
        """
        x = arithmetic.quantized(x.float(), self.block)
        out = torch.zeros_like(x)
        for expert in routing.ids.unique().tolist():
            if expert >= len(self.w13):
                continue
            token, slot = (routing.ids == expert).nonzero(as_tuple=True)
            y = self._expert(expert, x[token], arithmetic)
            out.index_add_(0, token, y * routing.weights[token, slot, None])
        return out

    def _expert(
        self, expert: int, x: torch.Tensor, arithmetic: Arithmetic
    ) -> torch.Tensor:
        columns = self.w2.shape[-1]
        grid = self.lead, self.w2_scale.shape[-1] * self.block - self.lead - columns
        w13, s13 = self.w13[expert], self.w13_scale[expert]
        gate, up = (
            x @ dequantized(w, s, (self.lead, 0), self.block).T
            for w, s in zip(w13.chunk(2), s13.chunk(2), strict=True)
        )
        h = torch.nn.functional.pad(arithmetic.intermediate(gate, up), grid)
        h = arithmetic.quantized(h, self.block)[:, self.lead : self.lead + columns]
        w2, s2 = self.w2[expert], self.w2_scale[expert]
        return h @ dequantized(w2, s2, (0, self.lead), self.block).T


@dataclass(frozen=True)
class Implementation:
    """One way to run a case's experts.

    Attributes:
        total: Intermediate columns over all ranks.
        tp_size: Tensor-parallel size.
        rank: This rank.
        expert_parallel: Give each rank whole experts.
        moe_backend: ``kernel_config.moe_backend``.
        padding: ``VLLM_FP8_TP_PADDING``.

    """

    total: int
    tp_size: int
    rank: int
    expert_parallel: bool = False
    moe_backend: str = "triton"
    padding: str = "auto"

    @property
    def is_stock(self) -> bool:
        """Whether vLLM's own method shall run it, plugin or not."""
        size = self.total // self.tp_size
        return self.expert_parallel or self.padding == "off" or size % BLOCK == 0

    def route(self, case: Case, routing: Routing) -> Routing:
        """Return what reaches this layer: under EP that of the worst-loaded rank."""
        if self.expert_parallel:
            return routing.worst_rank_first(case.experts, self.tp_size)
        return routing


def implementations(case: Case) -> dict[str, Implementation | None]:
    """Return what is compared, by column; None where vLLM has whole blocks nowhere."""
    tp, total, rank = case.tp_size, case.total, case.rank
    half = Implementation(total, tp // 2, rank // 2)
    return {
        "ours": Implementation(total, tp, rank),
        "padded": Implementation(case.shard.span * tp, tp, rank),
        # Chosen by vLLM as its engine does; "triton" would change what it refuses.
        "refined": Implementation(total, tp, rank, moe_backend="auto", padding="off"),
        "half_tp": half if half.is_stock else None,
        "ep": Implementation(total, tp, rank=0, expert_parallel=True),
        "deep_gemm": Implementation(
            case.shard.span * tp, tp, rank, moe_backend="deep_gemm"
        ),
    }


class Layer:
    """vLLM's layer for one rank, as an engine would call it.

    Args:
        case: Sizes.
        what: How they are run.
        seed: Of the weights.
        device: Where they live.
        checkpoint: The format that holds them.

    Raises:
        Exception: Whatever vLLM says against this layer.

    """

    def __init__(
        self,
        case: Case,
        what: Implementation,
        seed: int,
        device: torch.device,
        checkpoint: Checkpoint = checkpoints.FP8,
    ):
        self.what = what
        with mock.patch.dict(os.environ, VLLM_FP8_TP_PADDING=what.padding):
            with self.rank(), device:
                self.experts = _routed_experts(case, what, checkpoint)
            if what.is_stock:
                self.weights = _fill(self.experts, seed, checkpoint)
            else:
                self.weights = _load(case, self.experts, what, seed, checkpoint)
            with self.rank():
                method = self.experts.quant_method
                method.process_weights_after_loading(self.experts)
        stock = not hasattr(method, "store")
        assert stock == what.is_stock, f"{what} got {type(method).__name__}"
        assert stock or type(method.store).__name__ == "Compact", method.store
        self.arithmetic = (
            Arithmetic.stock(case, self.weights.block, device)
            if stock
            else Arithmetic.ours(case)
        )

    def rank(self):
        what = self.what
        return rank_of(what.tp_size, what.rank, what.moe_backend, what.expert_parallel)

    @property
    def kernel(self) -> str:
        """Name of vLLM's class that runs the experts."""
        return self.experts.quant_method.experts_cls.__name__

    def reference(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.weights.reference(x, routing, self.arithmetic)

    def __call__(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return the rank's output, in memory that the next call overwrites."""
        method = self.experts.quant_method
        return method.apply(self.experts, x, routing.weights, routing.ids, None, None)


def _routed_experts(
    case: Case, what: Implementation, checkpoint: Checkpoint
) -> torch.nn.Module:
    import vllm.model_executor.layers.fused_moe as fused_moe
    from vllm.config import get_current_vllm_config

    # Renamed in 0.31.
    factory = getattr(fused_moe, "FusedMoE", None) or fused_moe.FusedMoEFactory
    layer = factory(
        num_experts=case.experts,
        top_k=case.top_k,
        hidden_size=case.hidden,
        intermediate_size=what.total,
        params_dtype=torch.bfloat16,
        quant_config=checkpoint.quant_config(),
        tp_size=what.tp_size,
        dp_size=1,
        pcp_size=1,
        prefix="model.layers.0.mlp.experts",
        activation=case.activation,
        swiglu_limit=case.swiglu_limit,
    )
    # vLLM keeps layers by name, and refuses a name that it knows.
    get_current_vllm_config().compilation_config.static_forward_context.clear()
    return getattr(layer, "routed_experts", layer)


def _fill(experts, seed: int, checkpoint: Checkpoint) -> Weights:
    """Give a layer random weights, as stock would load them."""
    w13, w2 = experts.w13_weight.data, experts.w2_weight.data
    scales = [
        checkpoint.scales(experts, weight).data
        for weight in ("w13_weight", "w2_weight")
    ]
    generator = torch.Generator(w13.device).manual_seed(seed)
    for expert in (*w13, *w2):
        expert.copy_(normal(*expert.shape, generator=generator).to(FP8))
    for scale in scales:
        scale.copy_(random_scales(*scale.shape, generator=generator))
    return Weights(w13, w2, *scales, lead=0)


def _load(
    case: Case, experts, what: Implementation, seed: int, checkpoint: Checkpoint
) -> Weights:
    """Load a random checkpoint; return the rank's part, cut out of it here."""
    device, part = experts.w13_weight.device, case.shard_of(what.rank)
    generator = torch.Generator(device).manual_seed(seed)
    size, hidden = part.size, case.hidden
    first, blocks, groups = part.start // BLOCK, part.span // BLOCK, hidden // BLOCK
    codes, scales = {"dtype": FP8}, {"dtype": torch.float32}
    weights = Weights(
        torch.empty(case.experts, 2 * size, hidden, device=device, **codes),
        torch.empty(case.experts, hidden, size, device=device, **codes),
        torch.empty(case.experts, 2 * blocks, groups, device=device, **scales),
        torch.empty(case.experts, groups, blocks, device=device, **scales),
        lead=part.lead,
    )
    mine, mine_scales = (
        slice(part.start, part.start + size),
        slice(first, first + blocks),
    )
    for expert, (shard, name) in itertools.product(range(case.experts), SHARDS.items()):
        is_down, half = name == "w2_weight", shard == "w3"
        shape = (hidden, case.total) if is_down else (case.total, hidden)
        tensor = Quantized.random(*shape, generator)
        for param, loaded in (
            (getattr(experts, name), tensor.weight),
            (checkpoint.scales(experts, name), tensor.scale),
        ):
            param.weight_loader(param, loaded, f"{name} ({shard})", shard, expert)
        if is_down:
            weights.w2[expert] = tensor.weight[:, mine]
            weights.w2_scale[expert] = tensor.scale[:, mine_scales]
        else:
            weights.w13[expert].chunk(2)[half].copy_(tensor.weight[mine])
            weights.w13_scale[expert].chunk(2)[half].copy_(tensor.scale[mine_scales])
    return weights
