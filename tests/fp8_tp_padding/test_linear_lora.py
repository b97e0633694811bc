# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""LoRA adapters on padded linear layers, in vLLM's own LoRA layers."""

import pytest
import torch

from .exact import activations, matrix
from .tensor_parallel import rank_of, runs_kernels
from .test_linear_loading import HIDDEN, build, load, run

pytestmark = runs_kernels

TP, RANK, TOKENS = 8, 8, 3
# Kind -> sizes of the outputs of its shards, and arguments for it. 80 columns of 640
# on each rank straddle blocks; 2200 / 8 = 275 are odd.
LAYERS = {
    "RowParallelLinear": ([HIDDEN], {"input_size": 640, "output_size": HIDDEN}),
    "ColumnParallelLinear": ([2200], {"input_size": HIDDEN, "output_size": 2200}),
    "MergedColumnParallelLinear": (
        [640, 640],
        {"input_size": HIDDEN, "output_sizes": [640, 640]},
    ),
    # Two KV heads on eight ranks.
    "QKVParallelLinear": (
        [24 * 64, 2 * 64, 2 * 64],
        {
            "hidden_size": HIDDEN,
            "head_size": 64,
            "total_num_heads": 24,
            "total_num_kv_heads": 2,
        },
    ),
}
IDS = {"MergedColumnParallelLinear": (0, 1), "QKVParallelLinear": ("q", "k", "v")}


def rows_of(kind: str, index: int, size: int, rank: int) -> slice:
    """Return which of a shard's outputs a rank has."""
    if kind == "RowParallelLinear":
        return slice(None)
    is_replicated = kind == "QKVParallelLinear" and index > 0
    parts, part = (2, rank // 4) if is_replicated else (TP, rank)
    return slice(part * size // parts, (part + 1) * size // parts)


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Return float32 of which float32 holds all sums."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float()


def with_lora(layer, shards: int, rank: int):
    """Return what vLLM's LoRA manager makes of a layer."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.lora.utils import from_layer

    config = LoRAConfig(max_lora_rank=RANK, max_loras=1, lora_dtype=torch.float32)
    with rank_of(TP, rank, torch.float32):
        lora = from_layer(layer, 1, config, [""] * shards)
    punica = PunicaWrapperCPU(TOKENS, TOKENS, "cpu", lora_config=config)
    mapping = LoRAMapping((1,) * TOKENS, (1,) * TOKENS, is_prefill=True)
    with pytest.MonkeyPatch.context() as patch:
        # 0.26 pins memory without asking the platform.
        patch.setattr("vllm.utils.torch_utils.PIN_MEMORY", False, raising=False)
        punica.update_metadata(mapping, [1], 1, 1000)
    lora.set_mapping(punica)
    return lora


def set_lora(lora, pairs):
    a, b = ([pair[i] for pair in pairs] for i in range(2))
    lora.set_lora(0, *((a, b) if len(pairs) > 1 else (a[0], b[0])))


@pytest.mark.parametrize("rank", [0, 3, 6])
@pytest.mark.parametrize("kind", LAYERS)
def test_adapters_add_their_product(kind, rank):
    sizes, arguments = LAYERS[kind]
    columns = arguments.get("input_size", HIDDEN)
    layer = build(kind, TP, rank, torch.float32, bias=False, **arguments)
    assert type(layer.quant_method).__name__ == "CutFp8LinearMethod"
    tensors = [matrix(size, columns, seed) for seed, size in enumerate(sizes)]
    load(layer, dict(zip(IDS.get(kind, (None,)), tensors, strict=True)))
    x = activations(TOKENS, columns)
    mine = slice(None)
    if kind == "RowParallelLinear":
        mine = slice(rank * columns // TP, (rank + 1) * columns // TP)
    plain = run(layer, x[:, mine], TP, rank)

    lora = with_lora(layer, len(sizes), rank)
    assert type(lora).__name__.endswith("WithLoRA")
    pairs = [
        (integers(RANK, columns, seed=i), integers(size, RANK, seed=9 + i) / 64)
        for i, size in enumerate(sizes)
    ]
    set_lora(lora, pairs)
    added = torch.cat(
        [
            (x[:, mine] @ a[:, mine].T) @ b[rows_of(kind, i, len(b), rank)].T
            for i, (a, b) in enumerate(pairs)
        ],
        -1,
    )
    with rank_of(TP, rank, torch.float32):
        y = lora(x[:, mine])[0]
    assert added.abs().amax() > 1
    assert torch.equal(y, plain + added)
    lora.reset_lora(0)
    with rank_of(TP, rank, torch.float32):
        assert torch.equal(lora(x[:, mine])[0], plain)
