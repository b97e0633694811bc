"""That aligned linear layers stay stock, and what is said about padded ones."""

import pytest
import torch

from .experts import poison
from .tensor_parallel import rank_of
from .test_linear_forward import TP, Operators
from .test_linear_loading import (
    HIDDEN,
    build,
    load,
    matrix,
    merged,
    method_name,
    run,
)

ALIGNED = [
    ("ColumnParallelLinear", {"input_size": HIDDEN, "output_size": 1024}),
    ("RowParallelLinear", {"input_size": 1024, "output_size": HIDDEN}),
    (
        "MergedColumnParallelLinear",
        {"input_size": HIDDEN, "output_sizes": [1024, 2048]},
    ),
    (
        "QKVParallelLinear",
        {
            "hidden_size": HIDDEN,
            "head_size": 128,
            "total_num_heads": 8,
            "total_num_kv_heads": 2,
        },
    ),
]


@pytest.mark.parametrize(("kind", "kwargs"), ALIGNED, ids=[kind for kind, _ in ALIGNED])
def test_aligned_layers_are_untouched(plugin, kind, kwargs):
    """Same class, same bytes, and the same operators in a forward pass."""
    plugin.register()
    layer = aligned(kind, kwargs)
    plugin.unregister()
    stock = aligned(kind, kwargs)
    assert method_name(layer) == method_name(stock) == "Fp8LinearMethod"
    x = torch.randn(3, layer.input_size_per_partition, dtype=torch.bfloat16)
    seen, results = [], []
    for each in (layer, stock):
        with Operators() as operators:
            results.append(run(each, x, TP, 3))
        seen.append(operators.names)
    assert seen[0] == seen[1] and len(seen[0]) > 3
    assert torch.equal(*results)
    for (name, param), other in zip(
        layer.named_parameters(), stock.parameters(), strict=True
    ):
        assert torch.equal(param.view(torch.uint8), other.view(torch.uint8)), name


def test_expert_parallelism_leaves_linear_layers_cut():
    """A shared expert, say: only routed experts are whole on a rank."""
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    blocks = {"is_checkpoint_fp8_serialized": True, "weight_block_size": [128, 128]}
    with rank_of(TP, 3) as config:
        config.parallel_config.enable_expert_parallel = True
        layer = RowParallelLinear(640, HIDDEN, quant_config=Fp8Config(**blocks))
    assert method_name(layer) == "CutFp8LinearMethod"


@pytest.mark.parametrize("own", ["weight_loader", "weight_loader_v2", "forward"])
def test_layers_with_a_loader_of_their_own_are_stock(own):
    """Models call one or the other, and know nothing of the padding."""
    from vllm.model_executor.layers import linear

    stock = linear.MergedColumnParallelLinear
    others = type("Others", (stock,), {own: lambda self, *args: None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "MergedColumnParallelLinear", others)
        layer = merged(8, 1, [512, 512])
    assert type(layer) is others
    is_stock = method_name(layer) == "Fp8LinearMethod"
    assert is_stock == (own != "forward")


def aligned(kind: str, kwargs: dict):
    layer = build(kind, TP, 3, bias=False, **kwargs)
    poison(layer)
    hidden = HIDDEN
    if kind == "QKVParallelLinear":
        ids = {"q": 1024, "k": 256, "v": 256}
    elif kind == "MergedColumnParallelLinear":
        ids = dict(enumerate(kwargs["output_sizes"]))
    elif kind == "RowParallelLinear":
        hidden, ids = kwargs["input_size"], {None: HIDDEN}
    else:
        ids = {None: kwargs["output_size"]}
    load(layer, {i: matrix(rows, hidden, seed=7) for i, rows in ids.items()})
    return layer


def test_one_line_says_what_was_padded(padding_log):
    layers = [merged(8, 0, [512, 512]) for _ in range(2)]
    for layer in layers:
        load(layer, {i: matrix(512, HIDDEN, seed=i) for i in (0, 1)})
        run(layer, torch.zeros(1, HIDDEN).bfloat16(), 8, 0)
    (line,) = padding_log()
    assert "2 layer layers, 512 / TP 8 = 64 padded to 128; 0.1 MiB" in line.getMessage()
