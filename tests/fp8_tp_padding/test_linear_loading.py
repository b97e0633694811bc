# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Linear layers on the real vLLM classes: what the padded parameters hold."""

import pytest
import torch

from . import exact
from .experts import BLOCK, FP8, dequantize, poison, random_scales
from .moe_reference import fake_quantize, relative_error
from .tensor_parallel import rank_of, runs_kernels

HIDDEN = 256


def matrix(rows: int, columns: int, seed: int):
    """An FP8 matrix and its block scales, 10x apart between neighbours."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
    return weight.to(FP8), random_scales(rows, columns, generator=generator)


def build(kind, tp_size, rank, dtype=torch.bfloat16, quant_config=None, **kwargs):
    """Return one of vLLM's linear layers for one rank.

    Args:
        kind: Name of the class in ``vllm.model_executor.layers.linear``.
        tp_size: Tensor-parallel size.
        rank: This rank.
        dtype: The model's dtype.
        quant_config: Makes the config of another format of checkpoints than plain FP8.
        **kwargs: For the class.

    """
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    with rank_of(tp_size, rank, dtype):
        return getattr(linear, kind)(
            **kwargs,
            params_dtype=dtype,
            prefix="model.layers.0.layer",
            quant_config=quant_config()
            if quant_config
            else Fp8Config(
                is_checkpoint_fp8_serialized=True, weight_block_size=[BLOCK, BLOCK]
            ),
        )


def load(layer, tensors):
    """Load ``{shard id: (weight, scale)}``; the id None means no id."""
    for shard_id, (weight, scale) in tensors.items():
        ids = () if shard_id is None else (shard_id,)
        layer.weight.weight_loader(layer.weight, weight, *ids)
        layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, *ids)


@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize("total", [512, 640, 1216 * 8, 10944])
def test_row_parallel_ranks_rebuild(total, tp_size):
    weight, scale = matrix(HIDDEN, total, seed=0)
    whole = dequantize(weight, scale)
    size = total // tp_size
    parts = []
    for rank in range(tp_size):
        layer = build(
            "RowParallelLinear",
            tp_size,
            rank,
            input_size=total,
            output_size=HIDDEN,
            bias=False,
            reduce_results=False,
        )
        poison(layer)
        load(layer, {None: (weight, scale)})
        lead = rank * size % BLOCK
        mine = dequantize(layer.weight.data, layer.weight_scale_inv.data)
        parts.append(mine[:, lead : lead + size])
        codes = layer.weight.data.view(torch.uint8).clone()
        codes[:, lead : lead + size] = 0
        assert not codes.any()
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize("total", [512, 640, 1216 * 8, 10944])
def test_merged_column_ranks_rebuild(total, tp_size):
    tensors = {i: matrix(total, HIDDEN, seed=i) for i in range(2)}
    size = total // tp_size
    rebuilt = [torch.empty(total, HIDDEN) for _ in tensors]
    for rank in range(tp_size):
        layer = build(
            "MergedColumnParallelLinear",
            tp_size,
            rank,
            input_size=HIDDEN,
            output_sizes=[total, total],
            bias=False,
        )
        poison(layer)
        load(layer, tensors)
        lead = rank * size % BLOCK
        mine = dequantize(layer.weight.data, layer.weight_scale_inv.data)
        for index, half in enumerate(mine.chunk(2)):
            rebuilt[index][rank * size : (rank + 1) * size] = half[lead : lead + size]
    for index, whole in enumerate(rebuilt):
        assert torch.equal(whole, dequantize(*tensors[index]))


def linear_reference(x, weight, scale):
    groups = [fake_quantize(g) for g in x.split(BLOCK, -1)]
    return torch.cat(groups, -1) @ dequantize(weight, scale).T


@runs_kernels
@pytest.mark.parametrize("rank", range(8))
def test_qkv_with_replicated_heads(rank):
    """Heads of 64, two KV heads on eight ranks: every slice straddles or is small."""
    heads, kv_heads, head, hidden = 24, 2, 64, 256
    tensors = {
        "q": exact.matrix(heads * head, hidden, 0),
        "k": exact.matrix(kv_heads * head, hidden, 1),
        "v": exact.matrix(kv_heads * head, hidden, 2),
    }
    layer = build(
        "QKVParallelLinear",
        8,
        rank,
        dtype=torch.float32,
        hidden_size=hidden,
        head_size=head,
        total_num_heads=heads,
        total_num_kv_heads=kv_heads,
        bias=True,
    )
    assert type(layer.quant_method).__name__ == "CutFp8LinearMethod"
    poison(layer)
    load(layer, tensors)
    layer.bias.data.copy_(torch.arange(320.0))
    x = exact.activations(3, hidden)
    with rank_of(8, rank, torch.float32):
        layer.quant_method.process_weights_after_loading(layer)
        y, _ = layer(x)
    assert y.shape == (3, 320) and y.is_contiguous()
    rows = {"q": slice(rank * 192, rank * 192 + 192)}
    rows["k"] = rows["v"] = slice(rank // 4 * head, rank // 4 * head + head)
    expected = torch.cat(
        [linear_reference(x, *tensors[s])[:, rows[s]] for s in tensors], -1
    )
    expected += torch.arange(320.0)
    assert torch.equal(y, expected)


def method_name(layer) -> str:
    return type(layer.quant_method).__name__


def merged(tp_size, rank, sizes, **kwargs):
    return build(
        "MergedColumnParallelLinear",
        tp_size,
        rank,
        input_size=HIDDEN,
        output_sizes=sizes,
        bias=False,
        **kwargs,
    )


def run(layer, x, tp_size=1, rank=0):
    with rank_of(tp_size, rank, torch.float32):
        layer.quant_method.process_weights_after_loading(layer)
        y = layer(x)
    return y[0] if isinstance(y, tuple) else y


@runs_kernels
def test_small_shards_keep_their_scales_where_stock_overwrites_them(monkeypatch):
    """Three shards of 64 share two scale rows in stock: the last load wins.

    With a fourth, stock stops: its row 2 does not exist.
    """
    tensors = {i: exact.matrix(64, HIDDEN, seed=i) for i in range(3)}
    tensors = {i: (weight, 4.0**i * scale) for i, (weight, scale) in tensors.items()}
    x = exact.activations(3, HIDDEN)
    expected = torch.cat([linear_reference(x, *t) for t in tensors.values()], -1)
    outputs = {}
    for name, setting in (("ours", "auto"), ("stock", "off")):
        monkeypatch.setenv("VLLM_FP8_TP_PADDING", setting)
        layer = merged(1, 0, [64] * 3, dtype=torch.float32)
        load(layer, tensors)
        outputs[name] = run(layer, x)
    assert torch.equal(outputs["ours"], expected)
    assert relative_error(outputs["stock"], expected) > 0.1


@pytest.mark.parametrize("rank", range(4))
def test_fused_tensors_are_taken_apart(rank):
    tensors = {i: matrix(256, HIDDEN, seed=i) for i in range(3)}
    separate, fused, partly = (merged(4, rank, [256] * 3) for _ in range(3))
    weight, scale = (torch.cat([t[i] for t in tensors.values()]) for i in range(2))
    load(separate, tensors)
    load(fused, {None: (weight, scale)})
    load(partly, {0: tensors[0], (1, 2): (weight[256:], scale[2:])})
    for layer in (fused, partly):
        for name, param in layer.named_parameters():
            assert torch.equal(
                param.view(torch.uint8), getattr(separate, name).view(torch.uint8)
            )


@runs_kernels
@pytest.mark.parametrize("rank", range(4))
def test_fused_shards_inside_one_block_share_its_scale(rank):
    weight, scale = exact.matrix(192, HIDDEN, seed=0)
    layer = merged(4, rank, [128, 32, 32], dtype=torch.float32)
    poison(layer)
    load(layer, {None: (weight, scale)})
    x = exact.activations(3, HIDDEN)
    rows = [
        slice(rank * 32, rank * 32 + 32),
        *(slice(start + rank * 8, start + rank * 8 + 8) for start in (128, 160)),
    ]
    whole = linear_reference(x, weight, scale)
    expected = torch.cat([whole[:, mine] for mine in rows], -1)
    assert torch.equal(run(layer, x, 4, rank), expected)


@pytest.mark.parametrize("rank", range(4))
def test_shards_that_were_fused_after_quantization_keep_their_scales(rank):
    """As stock reads it, without tensor parallelism: each has blocks of its own."""
    tensors = {i: matrix(size, HIDDEN, seed=i) for i, size in enumerate((32, 192, 96))}
    separate, fused = (merged(4, rank, [32, 192, 96]) for _ in range(2))
    for layer in (separate, fused):
        poison(layer)
    load(separate, tensors)
    load(fused, {None: [torch.cat([t[i] for t in tensors.values()]) for i in (0, 1)]})
    for name, param in fused.named_parameters():
        expected = getattr(separate, name)
        assert torch.equal(param.view(torch.uint8), expected.view(torch.uint8))


def test_fused_scales_of_another_number_are_refused():
    layer = merged(2, 0, [32, 32])
    with pytest.raises(
        ValueError,
        match=r"shape \(3, 2\), but logical shards \[0, 1\] need 1 or 2 rows",
    ):
        layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, torch.ones(3, 2))


def test_a_fused_tensor_with_shards_inside_a_block_is_refused():
    layer = merged(2, 0, [192, 192])
    scale = torch.ones(3, 2)
    with pytest.raises(ValueError, match="logical shard 1 starts at row 192, inside"):
        layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale)


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        # 576 = 4.5 blocks at the end of a whole tensor: DeepSeek's kv_a_proj.
        ("ReplicatedLinear", {"input_size": 256, "output_size": 576}),
        (
            "MergedColumnParallelLinear",
            {"input_size": 256, "output_sizes": [256, 576], "disable_tp": True},
        ),
        ("ColumnParallelLinear", {"input_size": 256, "output_size": 1024}),
        ("RowParallelLinear", {"input_size": 1024, "output_size": 256}),
    ],
)
def test_other_layers_are_stock(kind, kwargs):
    layer = build(kind, 8, 3, bias=False, **kwargs)
    assert method_name(layer) == "Fp8LinearMethod"


@runs_kernels
@pytest.mark.parametrize("rank", range(8))
def test_row_parallel_forward(rank):
    weight, scale = exact.matrix(HIDDEN, 640, seed=0)
    layer = build(
        "RowParallelLinear",
        8,
        rank,
        dtype=torch.float32,
        input_size=640,
        output_size=HIDDEN,
        bias=False,
        reduce_results=False,
    )
    poison(layer)
    load(layer, {None: (weight, scale)})
    whole = torch.zeros(3, 640)
    mine = slice(rank * 80, rank * 80 + 80)
    whole[:, mine] = exact.activations(3, 640)[:, mine]
    y = run(layer, whole[:, mine], 8, rank)
    assert torch.equal(y, linear_reference(whole, weight, scale))


def test_vllm_sees_no_padding():
    layer = merged(8, 1, [512, 512])
    assert layer.logical_widths == [64, 64]
    assert layer.output_size_per_partition == 128
    assert layer.input_size_per_partition == HIDDEN
    assert list(dict(layer.named_parameters())) == ["weight", "weight_scale_inv"]


def kv_b_proj(rank):
    """MLA's projection: 2 heads of 96 + 64 on a rank; and its real weight."""
    sizes = {"input_size": HIDDEN, "output_size": 8 * 320, "bias": False}
    layer = build("ColumnParallelLinear", 8, rank, torch.float32, **sizes)
    weight, scale = exact.matrix(8 * 320, HIDDEN, seed=0)
    load(layer, {None: (weight, scale)})
    return layer, dequantize(weight, scale)[rank * 320 : rank * 320 + 320]


# It is read by products: each is multiplied by 448 and by 1 / 448, and added to zeros.
PRODUCTS = {"rtol": 4 * 2.0**-24, "atol": 0}


@runs_kernels
def test_raw_weights_are_read_without_padding():
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        get_and_maybe_dequant_weights,
    )

    layer, expected = kv_b_proj(rank=3)
    with rank_of(8, 3, torch.float32):
        layer.quant_method.process_weights_after_loading(layer)
        raw = get_and_maybe_dequant_weights(layer)
    assert raw.shape == expected.shape
    torch.testing.assert_close(raw, expected, **PRODUCTS)


@runs_kernels
def test_mla_for_amx_reads_raw_weights_without_padding(monkeypatch):
    """It reads the stored weight by itself from 0.31 on."""
    amx_mla = pytest.importorskip("vllm.v1.attention.backends.mla.amx_mla")
    from vllm.platforms import current_platform

    layer, expected = kv_b_proj(rank=3)
    layer._cpu_skip_gemm_dispatch = True  # As MLAAttention marks it.
    mla = object.__new__(amx_mla.AMXMLAImpl)
    mla.kv_b_proj, mla.kv_lora_rank, mla.num_heads = layer, HIDDEN, 2
    mla.qk_nope_head_dim, mla.v_head_dim = 96, 64
    packed = []
    pack = "convert_weight_packed"
    monkeypatch.setattr(torch.ops._C, pack, packed.append, raising=False)
    with rank_of(8, 3, torch.float32):
        with monkeypatch.context() as patch:
            patch.setattr(current_platform, "is_cpu", lambda: True)
            layer.quant_method.process_weights_after_loading(layer)
        mla.process_weights_after_loading(torch.float32)
    heads = expected.view(2, 96 + 64, HIDDEN)
    torch.testing.assert_close(packed[0], heads[:, :96].transpose(1, 2), **PRODUCTS)
    torch.testing.assert_close(packed[1], heads[:, 96:], **PRODUCTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w, s: (w[:100], s),
            r"weight of logical shard 0 has shape \(100, 256\), but",
        ),
        (lambda w, s: (w.bfloat16(), s), "dtype torch.bfloat16, but a block-quantized"),
        (
            lambda w, s: (w, s[:1]),
            r"weight_scale_inv of logical shard 0 has shape \(1, 2\), but",
        ),
    ],
)
def test_tensors_that_cannot_be_right(change, message):
    layer = merged(8, 3, [512, 512])
    with pytest.raises(ValueError, match=message):
        load(layer, {0: change(*matrix(512, HIDDEN, seed=0))})


def test_scale_that_is_no_scale():
    layer = merged(8, 3, [512, 512])
    weight, scale = matrix(512, HIDDEN, seed=0)
    bad = scale.clone()
    bad[1, 0] = 0.0
    load(layer, {0: (weight, scale), 1: (weight, bad)})
    with pytest.raises(
        ValueError, match=r"logical shard 1 holds .* 0.0 for block \(1,"
    ):
        run(layer, torch.zeros(1, HIDDEN), 8, 3)


def test_missing_scale():
    layer = merged(8, 3, [512, 512])
    weight, scale = matrix(512, HIDDEN, seed=0)
    load(layer, {0: (weight, scale)})
    layer.weight.weight_loader(layer.weight, weight, 1)
    with pytest.raises(ValueError, match="scale_inv of logical shard 1 is missing"):
        run(layer, torch.zeros(1, HIDDEN), 8, 3)


@runs_kernels
def test_vllm_reloads_layer_by_layer():
    from vllm.model_executor.model_loader import reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    first, second = ({i: matrix(512, HIDDEN, i + n) for i in (0, 1)} for n in (0, 5))
    fresh = merged(8, 1, [512, 512])
    load(fresh, second)
    run(fresh, torch.zeros(1, HIDDEN).bfloat16(), 8, 1)
    model = torch.nn.Module()
    layer = model.layer = merged(8, 1, [512, 512])
    reload.record_metadata_for_reloading(model)
    load(layer, first)
    run(layer, torch.zeros(1, HIDDEN).bfloat16(), 8, 1)
    with rank_of(8, 1) as config:
        reload.initialize_layerwise_reload(model)
        load(layer, second)
        assert not get_layerwise_info(layer).can_load()
        reload.finalize_layerwise_reload(model, config.model_config)
    for name, param in layer.named_parameters():
        expected = getattr(fresh, name)
        assert torch.equal(param.view(torch.uint8), expected.view(torch.uint8)), name


def test_off_is_stock(monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "off")
    with pytest.raises(ValueError, match="input_size_per_partition = 64 is not div"):
        build("RowParallelLinear", 8, 0, input_size=512, output_size=256, bias=False)
