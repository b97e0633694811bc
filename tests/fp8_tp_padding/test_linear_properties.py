# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Any sizes, any ranks: what a rank computes, against a brute-force oracle."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels import columns
from vllm.model_executor.layers.quantization.fp8_tp_padding.loading import linear_loader
from vllm.model_executor.layers.quantization.fp8_tp_padding.slices import linear_layout

BLOCK = 4


def blocks_of(rows: int, columns: int, generator: torch.Generator):
    """A matrix of small integers, and a scale for each 4x4 block: exact in float32."""
    weight = torch.randint(1, 8, (rows, columns), generator=generator).float()
    shape = -(-rows // BLOCK), -(-columns // BLOCK)
    scale = 2.0 ** torch.randint(-3, 4, shape, generator=generator).float()
    return weight, scale


def dequantize_one_by_one(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scales = scale.tolist()
    return torch.tensor(
        [
            [code * scales[i // BLOCK][j // BLOCK] for j, code in enumerate(row)]
            for i, row in enumerate(weight.tolist())
        ]
    )


def load(layout, weights, scales):
    """Load all shards through the loaders; return the dequantized buffer."""
    buffers = {}
    for tensor in linear_loader.linear_tensors(layout, "weight_scale_inv"):
        rows = sum(window.span for window in layout.output_windows())
        if tensor.kind == "scale":
            rows = sum(window.span for window in layout.output_blocks())
        empty = torch.full((rows, tensor.windows[1].span), float("nan"))
        data = buffers.setdefault(tensor.kind, empty)
        tensor.load(
            data, (weights if tensor.kind == "weight" else scales)[tensor.shard]
        )
    return dequantize_one_by_one(buffers["weight"], buffers["scale"])


def run(layout, x, buffer):
    return columns.RealColumns(layout.output_windows())(x @ buffer.T)


@st.composite
def column_layers(draw):
    tp_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    replicas = draw(st.sampled_from([d for d in (1, 2, 4) if tp_size % d == 0]))
    shards = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    return tp_size, replicas, shards, draw(st.integers(1, 12)), draw(st.integers(0, 99))


# A busy machine is slow, not wrong; and the first example imports vLLM's modules.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@patient
@given(column_layers())
def test_column_parallel(case):
    """Odd shards are shared by ``replicas`` ranks, as KV heads are."""
    tp_size, replicas, shards, hidden, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (2, hidden), generator=generator).float()
    parts = [tp_size // replicas if i % 2 else tp_size for i in range(len(shards))]
    pairs = [
        blocks_of(size * part, hidden, generator)
        for size, part in zip(shards, parts, strict=True)
    ]
    for rank in range(tp_size):
        ranks = [rank // replicas if i % 2 else rank for i in range(len(shards))]
        outputs = tuple(
            linear_layout.Dimension(size * part, part_rank, part, BLOCK)
            for size, part, part_rank in zip(shards, parts, ranks, strict=True)
        )
        inputs = linear_layout.Dimension(hidden, 0, 1, BLOCK)
        layout = linear_layout.LinearLayout(outputs, inputs, False)
        buffer = load(layout, [w for w, _ in pairs], [s for _, s in pairs])
        expected = [
            dequantize_one_by_one(*pair)[part_rank * size : (part_rank + 1) * size]
            for pair, size, part_rank in zip(pairs, shards, ranks, strict=True)
        ]
        assert torch.equal(run(layout, x, buffer), x @ torch.cat(expected).T)


@patient
@given(
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_row_parallel(tp_size, size, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, scale = blocks_of(rows, size * tp_size, generator)
    x = torch.randint(-3, 4, (2, size * tp_size), generator=generator).float()
    summed = torch.zeros(2, rows)
    for rank in range(tp_size):
        outputs = (linear_layout.Dimension(rows, 0, 1, BLOCK),)
        inputs = linear_layout.Dimension(size * tp_size, rank, tp_size, BLOCK)
        layout = linear_layout.LinearLayout(outputs, inputs, True)
        window = layout.input_window()
        mine = torch.zeros(2, window.span)
        mine[:, window.lead : window.lead + size] = x[
            :, rank * size : (rank + 1) * size
        ]
        summed += mine @ load(layout, [weight], [scale]).T
    assert torch.equal(summed, x @ dequantize_one_by_one(weight, scale).T)
