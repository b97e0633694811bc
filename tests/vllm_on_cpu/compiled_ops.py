"""Stand-ins in torch for the compiled operators that the Triton MoE path calls."""

import torch

_libraries = {n: torch.library.Library(n, "FRAGMENT") for n in ("_C", "_moe_C")}
_stand_ins = []


def install() -> None:
    """Define each operator that this torch does not have."""
    for namespace, schema, function in _stand_ins:
        name = schema.partition("(")[0]
        if not hasattr(getattr(torch.ops, namespace), name):
            library = _libraries[namespace]
            library.define(schema)
            library.impl(name, function, "CompositeExplicitAutograd")


def _stands_in(*schemas: str, namespace: str = "_C"):
    def note(function):
        _stand_ins.extend((namespace, schema, function) for schema in schemas)
        return function

    return note


@_stands_in(
    "cutlass_scaled_mm_supports_fp8(int c) -> bool",
    "cutlass_scaled_mm_supports_block_fp8(int c) -> bool",
    "cutlass_group_gemm_supported(int c) -> bool",
)
def _no(_capability):
    return False


@_stands_in(
    "per_token_group_fp8_quant(Tensor input, Tensor(a!) output_q, Tensor(b!) output_s, "
    "int group_size, float eps, float fp8_min, float fp8_max, bool scale_ue8m0=False, "
    "bool a=False, bool b=False) -> ()"
)
def _quantize_groups(x, out, scales, group_size, eps, low, high, ue8m0=False, *_):
    groups = x.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1).clamp_min(eps) / high
    if ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    # A product, as in 0.33's CUDA kernel: a quotient would round some ties otherwise.
    codes = (groups * scale[..., None].reciprocal()).clamp(low, high)
    out.copy_(codes.flatten(-2).to(out.dtype))
    scales.copy_(scale)


@_stands_in("silu_and_mul(Tensor(a!) result, Tensor input) -> ()")
def _silu_and_mul(out, x):
    gate, up = x.chunk(2, -1)
    # As in vLLM's CUDA kernel, the SiLU is rounded before it is multiplied.
    out.copy_(torch.nn.functional.silu(gate.float()).to(x.dtype) * up)


@_stands_in(
    "silu_and_mul_with_clamp(Tensor(a!) result, Tensor input, float limit, "
    "float alpha=1.0, float beta=0.0) -> ()"
)
def _silu_and_mul_with_clamp(out, x, limit, alpha=1.0, beta=0.0):
    gate, up = x.float().chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    silu = (gate * torch.sigmoid(alpha * gate)).to(x.dtype)
    out.copy_(silu * (up + beta).to(x.dtype))


@_stands_in("gelu_tanh_and_mul(Tensor(a!) out, Tensor input) -> ()")
def _gelu_tanh_and_mul(out, x):
    gate, up = x.chunk(2, -1)
    gelu = torch.nn.functional.gelu(gate.float(), approximate="tanh")
    out.copy_(gelu.to(x.dtype) * up)


@_stands_in(
    "silu_and_mul_per_block_quant(Tensor(a!) out, Tensor input, Tensor(b!) scales, "
    "int group_size, Tensor? scale_ub=None, bool is_scale_transposed=False) -> ()"
)
def _silu_and_mul_quantize(out, x, scales, group_size, scale_ub=None, transposed=False):
    gate, up = x.float().chunk(2, -1)
    assert up.shape[-1] % group_size == 0, "the CUDA kernel refuses partial groups"
    hidden = torch.nn.functional.silu(gate) * up
    _quantize_groups(hidden, out, scales, group_size, 1e-10, -448.0, 448.0)


@_stands_in(
    "moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, "
    "Tensor(a!) sorted_token_ids, Tensor(b!) experts_ids, "
    "Tensor(c!) num_tokens_post_pad, Tensor? maybe_expert_map=None, "
    "Tensor? scatter_idx=None) -> ()",
    namespace="_moe_C",
)
def _moe_align_block_size(
    topk_ids,
    num_experts,
    block_size,
    sorted_ids,
    expert_ids,
    num_tokens_post_pad,
    expert_map=None,
    scatter_idx=None,
):
    assert scatter_idx is None
    flat = topk_ids.reshape(-1).long()
    sorted_ids.fill_(flat.numel())
    expert_ids.fill_(0 if expert_map is None else -1)
    position = 0
    for expert in range(num_experts):
        local = expert if expert_map is None else int(expert_map[expert])
        tokens = (flat == expert).nonzero().flatten()
        if local < 0 or tokens.numel() == 0:
            continue
        sorted_ids[position : position + tokens.numel()] = tokens.int()
        blocks = -(-tokens.numel() // block_size)
        first = position // block_size
        expert_ids[first : first + blocks] = local
        position += blocks * block_size
    num_tokens_post_pad.fill_(position)


@_stands_in(
    "moe_sum(Tensor input, Tensor(a!) output, Tensor? topk_ids=None, "
    "Tensor? expert_map=None) -> ()",
    namespace="_moe_C",
)
def _moe_sum(x, out, topk_ids=None, expert_map=None):
    x = x.float()
    if expert_map is not None:
        # What remote experts left in the workspace is not theirs.
        local = expert_map[topk_ids.long()] >= 0
        x = torch.where(local[..., None], x, 0.0)
    out.copy_(x.sum(1).to(out.dtype))
