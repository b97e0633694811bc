"""Linear layers of other formats than plain FP8, on the real vLLM classes."""

import pytest
import torch

from tests.fp8_tp_padding.exact import activations, matrix
from tests.fp8_tp_padding.experts import poison
from tests.fp8_tp_padding.test_linear_forward import of_columns, rows_of
from tests.fp8_tp_padding.test_linear_loading import (
    HIDDEN,
    build,
    linear_reference,
    run,
)

TP = 8
SIZES = (512, 640, 2200)


def load(checkpoint_format, layer, tensors):
    name = checkpoint_format.scale
    for shard_id, (weight, scale) in tensors.items():
        ids = () if shard_id is None else (shard_id,)
        layer.weight.weight_loader(layer.weight, weight, *ids)
        param = getattr(layer, name)
        param.weight_loader(param, checkpoint_format.shape(scale), *ids)


def inner_method(layer):
    """Return the method; of INC's scheme, the one that it wraps."""
    method = layer.quant_method
    return getattr(getattr(method, "scheme", None), "linear_method", method)


def built(checkpoint_format, kind, rank, **sizes):
    make = checkpoint_format.quant_config
    layer = build(kind, TP, rank, torch.float32, quant_config=make, **sizes)
    assert type(inner_method(layer)).__name__ == checkpoint_format.cut_linear
    poison(layer)
    return layer


@pytest.mark.parametrize("total", SIZES)
@pytest.mark.parametrize("rank", [3, 7, 0])
def test_merged_column_parallel(of_linear, total, rank):
    """Exact to the last bit, with a bias, next to an aligned shard."""
    totals = [total, 1024]
    tensors = {i: matrix(size, HIDDEN, seed=i) for i, size in enumerate(totals)}
    sizes = {"input_size": HIDDEN, "output_sizes": totals, "bias": True}
    layer = built(of_linear, "MergedColumnParallelLinear", rank, **sizes)
    load(of_linear, layer, tensors)
    bias = torch.arange(float(layer.bias.numel()))
    layer.bias.data.copy_(bias)
    x = activations(3, HIDDEN)
    shards = [
        linear_reference(x, *tensors[i])[:, rows_of(size, rank)]
        for i, size in enumerate(totals)
    ]
    assert torch.equal(run(layer, x, TP, rank), torch.cat(shards, -1) + bias)


@pytest.mark.parametrize(("total", "rows"), [(n, HIDDEN) for n in SIZES] + [(640, 200)])
def test_row_parallel_sums_to_the_whole(of_linear, total, rows):
    """Also where the output ends inside a block, which ModelOpt's method pads."""
    weight, scale = matrix(rows, total, seed=0)
    x = activations(3, total)
    summed, expected = torch.zeros(3, rows), torch.zeros(3, rows)
    for rank in range(TP):
        sizes = {"input_size": total, "output_size": rows, "bias": False}
        layer = built(of_linear, "RowParallelLinear", rank, **sizes)
        load(of_linear, layer, {None: (weight, scale)})
        mine = rows_of(total, rank)
        expected += of_columns(mine, x, weight, scale)
        summed += run(layer, x[:, mine], TP, rank)
    assert torch.equal(summed, expected)


def test_sizes_that_keep_blocks_whole_are_stock(of_linear):
    make = of_linear.quant_config
    sizes = {"input_size": HIDDEN, "output_size": 1024}
    layer = build("ColumnParallelLinear", TP, 3, quant_config=make, **sizes)
    assert type(inner_method(layer)).__module__.startswith("vllm.")


def test_a_missing_scale_is_named(of_linear):
    sizes = {"input_size": 640, "output_size": HIDDEN, "bias": False}
    layer = built(of_linear, "RowParallelLinear", 3, **sizes)
    weight, _ = matrix(HIDDEN, 640, seed=0)
    layer.weight.weight_loader(layer.weight, weight)
    with pytest.raises(ValueError, match=f"{of_linear.scale} of .* is missing"):
        run(layer, activations(3, 80), TP, 3)
