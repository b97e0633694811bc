# SPDX-License-Identifier: Apache-2.0
"""The FP8 operators of vLLM's CPU build in plain torch: same arguments, same blocks.

As there, weights are dequantized and activations stay in bfloat16.
"""

import functools
import inspect
from types import ModuleType

import torch
from torch.nn.functional import silu

BLOCK = [128, 128]
# Members of enumerations, some of which only newer releases pass.
CHOICES = {"moe_comp_method": "FP8_W8A16", "act_method": "SILU_AND_MUL"}
_libraries: list[torch.library.Library] = []


def define(custom_ops: ModuleType) -> None:
    """Define the operators that torch lacks, and replace ``fused_experts_cpu``.

    Args:
        custom_ops: ``vllm._custom_ops``, from which vLLM imports the latter. Its
            parameters differ between releases, so they are bound by name.

    """
    library = torch.library.Library("_C", "FRAGMENT")
    library.define("convert_weight_packed(Tensor(a) weight) -> Tensor(a)")
    library.define(
        "fp8_scaled_mm_cpu(Tensor x, Tensor weight, Tensor scale, int[] block, "
        "Tensor? bias, ScalarType dtype, bool packed) -> Tensor"
    )
    for name, function in (
        ("convert_weight_packed", lambda weight: weight.data),
        ("fp8_scaled_mm_cpu", scaled_mm),
    ):
        library.impl(name, function, "CompositeExplicitAutograd")
    _libraries.append(library)  # Gone with it are the operators.
    custom_ops._supports_cpu_fp8_w8a16 = True  # It has looked for them before.

    signature = inspect.signature(custom_ops.fused_experts_cpu)

    @functools.wraps(custom_ops.fused_experts_cpu)
    def fused_experts_cpu(*args, **kwargs):
        return _fused_experts(signature.bind(*args, **kwargs).arguments)

    custom_ops.fused_experts_cpu = fused_experts_cpu


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: list[int]):
    """Return float32 ``weight * scale``, the last blocks whole or not.

    Args:
        weight: float8_e4m3fn ``[rows, columns]``.
        scale: float32, one for each ``block``.
        block: Rows and columns of a quant block.

    """
    rows, columns = weight.shape
    scale = scale.repeat_interleave(block[0], 0)[:rows]
    return weight.float() * scale.repeat_interleave(block[1], 1)[:, :columns]


def scaled_mm(x, weight, scale, block, bias, dtype, packed) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` of ``dtype``, summed in float32."""
    y = x.float() @ dequantize(weight, scale, block).T
    return (y if bias is None else y + bias.float()).to(dtype)


def _fused_experts(arguments: dict) -> torch.Tensor | None:
    known = {"out", "hidden_states", "w1", "w2", "topk_weights", "topk_ids"}
    known |= {"w1_scale", "w2_scale", "block_size", "moe_comp_method"}
    known |= {"inplace", "is_vnni"}  # Of some releases.
    for name, value in arguments.items():
        if name in CHOICES:
            taken = value.name == CHOICES[name]
        else:
            taken = name in known or value is None
        if not taken:
            raise NotImplementedError(
                f"fused_experts_cpu with {name}: plain torch computes block-FP8 "
                "experts with SiLU only. Run parity on a CPU with AVX-512 and BF16."
            )
    x, ids = arguments["hidden_states"], arguments["topk_ids"]
    block = arguments.get("block_size") or BLOCK

    def weight(name: str, expert: int) -> torch.Tensor:
        scale = arguments[f"{name}_scale"]
        return dequantize(arguments[name][expert], scale[expert], block)

    y = torch.zeros(x.shape, dtype=torch.float32)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ weight("w1", expert).T).chunk(2, -1)
        # vLLM's operator keeps this in the dtype of the activations, too.
        h = (silu(gate) * up).to(x.dtype).float()
        factors = arguments["topk_weights"][token, slot, None].float()
        y.index_add_(0, token, (h @ weight("w2", expert).T) * factors)
    out = arguments.get("out")
    if out is None:
        return y.to(x.dtype)
    out.copy_(y)
    return None
