# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Real ``RoutedExperts`` layers and the checkpoints they load."""

from dataclasses import dataclass

import torch

from . import exact
from .tensor_parallel import rank_of

BLOCK = 128
PREFIX = "model.layers.0.mlp.experts"
FP8 = torch.float8_e4m3fn
SHARDS = {"w1": "w13", "w3": "w13", "w2": "w2"}


@dataclass
class Checkpoint:
    """Random experts, as a checkpoint holds them.

    ``weights[shard]`` is float8_e4m3fn ``[experts, rows, columns]`` and
    ``scales[shard]`` float32 ``[experts, ceil(rows / 128), ceil(columns / 128)]``;
    neighbouring blocks differ 10x in scale.
    """

    weights: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor]

    @classmethod
    def random(cls, total: int, experts=2, hidden=256, gated=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"w1": (total, hidden), "w3": (total, hidden), "w2": (hidden, total)}
        if not gated:
            del shapes["w3"]
        weights, scales = {}, {}
        for shard, (rows, columns) in shapes.items():
            codes = torch.randn(
                experts, rows, columns, generator=generator, dtype=torch.float32
            )
            weights[shard] = codes.to(FP8)
            scales[shard] = random_scales(experts, rows, columns, generator=generator)
        return cls(weights, scales)

    @classmethod
    def exact(cls, total: int, experts: int, hidden: int, numbers=exact, gated=True):
        """Return experts whose sums are exact in float32.

        Args:
            total: Intermediate size of one expert.
            experts: Number of experts.
            hidden: Hidden size.
            numbers: What draws them: ``exact``, or ``exact.AnyScale``, whose sums are
                exact within a quant block only.
            gated: Whether there are gate and up.

        """
        generator = torch.Generator().manual_seed(0)
        shapes = {"w1": (total, hidden), "w3": (total, hidden), "w2": (hidden, total)}
        if not gated:
            del shapes["w3"]
        pairs = {
            shard: (
                numbers.weights(experts, *shape, generator=generator),
                numbers.scales(experts, *shape, generator=generator),
            )
            for shard, shape in shapes.items()
        }
        weights, scales = (
            {shard: pair[i] for shard, pair in pairs.items()} for i in range(2)
        )
        return cls(weights, scales)

    def dequantized(self, shard: str, dtype=torch.float32) -> torch.Tensor:
        return dequantize(self.weights[shard], self.scales[shard], dtype)


def random_scales(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Return float32 scales for a weight ``[..., rows, columns]``.

    Neighbouring blocks differ 10x, so that a scale in the wrong place shows.
    """
    blocks = *shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK)
    odd = torch.arange(blocks[-2])[:, None] + torch.arange(blocks[-1])
    step = torch.where(odd % 2 == 1, 10.0, 1.0).float()
    jitter = 1 + torch.rand(blocks, generator=generator, dtype=torch.float32)
    return 0.005 * step * jitter


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, dtype=torch.float32
) -> torch.Tensor:
    """Return ``weight * scale``, one scale for each 128x128 block."""
    rows, columns = weight.shape[-2:]
    full = scale.to(dtype).repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return weight.to(dtype) * full[..., :rows, :columns]


def vllm_version() -> tuple[int, int]:
    """Major and minor number of the release under test."""
    import vllm

    return tuple(int(part) for part in vllm.__version__.split(".")[:2])


def ungated() -> dict:
    """What makes experts of one projection, which are in FP8 blocks from 0.28."""
    none = None if vllm_version() >= (0, 32) else ""
    names = ("up_proj", "down_proj", none)
    return {"activation": "relu2_no_mul", "ckpt_names": names}


def build(*args, **kwargs):
    """Return vLLM's expert layer for one rank; takes what ``runner`` takes."""
    made = runner(*args, **kwargs)
    return getattr(made, "routed_experts", made)


def runner(
    total: int,
    tp_size: int,
    rank: int,
    experts=2,
    hidden=256,
    dtype=torch.bfloat16,
    dp=(1, 0),
    backend="auto",
    weight_block_size=(BLOCK, BLOCK),
    expert_parallel=False,
    lora=False,
    quant_config=None,
    **kwargs,
):
    """Return what vLLM's own factory makes for one rank, and runs experts.

    Args:
        total: Intermediate size of one expert, over all ranks.
        tp_size: Tensor-parallel size.
        rank: This rank.
        experts: Number of experts.
        hidden: Hidden size.
        dtype: The model's dtype.
        dp: Data-parallel size and rank.
        backend: ``kernel_config.moe_backend``.
        weight_block_size: Quant block, or None for per-tensor scales.
        expert_parallel: Give each rank whole experts.
        lora: Configure LoRA adapters.
        quant_config: Makes the config of another format of checkpoints than plain FP8.
        **kwargs: For vLLM's factory.

    """
    import vllm.model_executor.layers.fused_moe as fused_moe
    from vllm.config import LoRAConfig
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    factory = getattr(fused_moe, "FusedMoE", None) or fused_moe.FusedMoEFactory
    with rank_of(tp_size, rank, dtype, dp, backend) as config:
        config.parallel_config.enable_expert_parallel = expert_parallel
        if lora:
            config.lora_config = LoRAConfig()
        return factory(
            num_experts=experts,
            top_k=min(2, experts),
            hidden_size=hidden,
            intermediate_size=total,
            params_dtype=dtype,
            quant_config=quant_config()
            if quant_config
            else Fp8Config(
                is_checkpoint_fp8_serialized=True,
                weight_block_size=weight_block_size and list(weight_block_size),
            ),
            tp_size=tp_size,
            dp_size=dp[0],
            pcp_size=1,
            prefix=PREFIX,
            **kwargs,
        )


def poison(layer: torch.nn.Module) -> None:
    """Fill every parameter with NaN, as memory that was used before may be."""
    for param in layer.parameters():
        if param.dtype == FP8:
            param.data.view(torch.uint8).fill_(0x7F)
        else:
            param.data.fill_(float("nan"))


def load_tensor(layer, name: str, tensor: torch.Tensor, shard: str, expert: int):
    """Load one checkpoint tensor as vLLM's model loaders do."""
    param = getattr(layer, name)
    assert param.weight_loader.supports_moe_loading
    return param.weight_loader(
        param,
        tensor,
        f"{PREFIX}.{name}",
        shard_id=shard,
        expert_id=expert,
        return_success=True,
    )


def load(
    layer, checkpoint: Checkpoint, fused=False, scale_name="weight_scale_inv"
) -> None:
    """Load a checkpoint, expert by expert or as fused 3-D tensors."""
    for shard, stem in SHARDS.items():
        if shard not in checkpoint.weights:
            continue
        for name, tensors in (
            (f"{stem}_weight", checkpoint.weights[shard]),
            (f"{stem}_{scale_name}", checkpoint.scales[shard]),
        ):
            if fused:
                assert load_tensor(layer, name, tensors, shard, 0)
                continue
            for expert, tensor in enumerate(tensors):
                assert load_tensor(layer, name, tensor, shard, expert)


def process(layer, tp_size: int, rank: int, dtype=torch.bfloat16) -> None:
    """Let the method turn the loaded weights into what its kernel takes."""
    with rank_of(tp_size, rank, dtype):
        layer.quant_method.process_weights_after_loading(layer)


def padded(
    layer, shard: str, scale_name="weight_scale_inv"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the padded weight and scales of ``shard`` from the parameters."""
    stem = SHARDS[shard]
    weight = getattr(layer, f"{stem}_weight").data
    scale = getattr(layer, f"{stem}_{scale_name}").data
    if shard == "w2":
        return weight, scale
    slots = 2 if layer.moe_config.is_act_and_mul else 1
    index = 1 if shard == "w3" else 0
    return weight.chunk(slots, 1)[index], scale.chunk(slots, 1)[index]
