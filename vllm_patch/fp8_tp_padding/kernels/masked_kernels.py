# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Triton kernels for block-FP8 experts whose columns are cut inside a quant block.

Weights are stored compactly: only the rank's ``SIZE`` real columns. Position
``p`` of the padded span is column ``p - LEAD`` of the store and belongs to quant
block ``p // 128``, so tiles lie on the checkpoint's block grid and never hold two
scales. Tiles that are all padding are not launched; in the first and the last
one, loads and stores are masked. Rows are pairs (``pair_kernels.py``).
"""

from vllm.triton_utils import tl, triton

from . import fp8_quant
from .dependent_launch import let_next_start, wait_for_previous
from .fp8_quant import constant, quantize_rows
from .masked_activation import activated
from .pair_kernels import block_of_pairs, expert_of

BLOCK = constant(fp8_quant.BLOCK)
HALF = constant(fp8_quant.BLOCK // 2)


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWAP: tl.constexpr):
    """Accumulator of ``ROWS`` pairs, transposed if ``SWAP``."""
    if SWAP:
        return tl.zeros([COLUMNS, ROWS], tl.float32)
    else:
        return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def _dot(x, w, acc, SWAP: tl.constexpr):
    """``acc + x @ w.T``, or its transpose.

    ``SWAP`` makes the weights the first operand: Hopper's matrix instructions
    take no fewer than 64 rows of that, and pairs are few in a small batch.
    """
    if SWAP:
        return tl.dot(w, tl.trans(x), acc)
    else:
        return tl.dot(x, tl.trans(w), acc)


@triton.jit
def _interleaved(COLUMNS: tl.constexpr, SHARDS: tl.constexpr, SWAP: tl.constexpr):
    """Column of each row of a tile of gate and up, and 0 for gate, 1 for up.

    A thread has two neighbouring columns of an accumulator, or two rows that are eight
    apart: gate and up of one column, so that it can take them apart by itself.
    """
    row = tl.arange(0, SHARDS * COLUMNS)
    if SHARDS == 1:
        return row, 0
    elif SWAP:
        return row // 16 * 8 + row % 8, row // 8 % 2
    else:
        return row // 2, row % 2


@triton.jit
def _gate_and_up(
    both,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARDS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Take apart what was multiplied by interleaved rows."""
    if SHARDS == 1:
        return both, both
    elif SWAP:
        both = tl.reshape(both, [COLUMNS // 8, 2, 8, ROWS])
        both = tl.reshape(tl.permute(both, 0, 2, 3, 1), [COLUMNS, ROWS, 2])
        return tl.split(both)
    else:
        return tl.split(tl.reshape(both, [ROWS, COLUMNS, 2]))


@triton.jit
def _per_pair(values, SWAP: tl.constexpr):
    """Values of pairs, to broadcast over an accumulator."""
    if SWAP:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit(do_not_specialize=["num_pairs"])
def gate_up_kernel(
    x_codes_ptr,  # [num_tokens, K] fp8
    x_scale_ptr,  # [num_tokens, K // 128] fp32
    w13_ptr,  # [experts, SHARDS * SIZE, K] fp8: gate rows, then up rows
    w13_scale_ptr,  # [experts, SHARDS * NUM_BLOCKS, K // 128] fp32
    h_ptr,  # [num_pairs, SIZE] bf16/fp16/fp32, out; split: see ``_load_h``
    sorted_pairs_ptr,
    block_experts_ptr,
    num_blocks_ptr,
    topk_ids_ptr,
    num_pairs,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SWAP: tl.constexpr,
    PLACED: tl.constexpr,
    BINS: tl.constexpr,
    PAIRS: tl.constexpr,
    UNROLL: tl.constexpr,
    SHARDS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """``activated(x @ gate.T, x @ up.T)`` for one block of pairs and BLOCK_N columns.

    Grid: ``blocks of pairs * SPLITS * tiles of the span that hold real columns``. Each
    of several ``SPLITS`` takes a part of ``K`` and writes its part of both products.
    There is no up if ``SHARDS`` is 1.
    """
    # What sorts is the kernel before this one.
    if PLACED == "sorted":
        wait_for_previous(USE_PDL)
    FIRST: tl.constexpr = LEAD // BLOCK_N
    TILES: tl.constexpr = (LEAD + SIZE + BLOCK_N - 1) // BLOCK_N - FIRST
    K_BLOCKS: tl.constexpr = K // BLOCK
    pid = tl.program_id(0)
    pair, expert = block_of_pairs(
        pid // TILES // SPLITS,
        sorted_pairs_ptr,
        block_experts_ptr,
        num_blocks_ptr,
        topk_ids_ptr,
        num_pairs,
        BLOCK_M,
        PLACED,
        EXPERTS,
        BINS,
        PAIRS,
    )
    if PLACED != "sorted":
        wait_for_previous(USE_PDL)
    # Weights that down loads meanwhile take bandwidth, which few pairs need themselves.
    if PLACED != "alone":
        let_next_start(USE_PDL)
    if expert < 0:
        return

    tile = FIRST + pid % TILES
    offset = tile * BLOCK_N - LEAD
    token = (pair // TOP_K).to(tl.int64)
    is_pair = pair < num_pairs
    k = tl.arange(0, BLOCK)
    x_ptrs = x_codes_ptr + token[:, None] * K + k[None, :]
    x_scale_ptrs = x_scale_ptr + token * K_BLOCKS
    row, is_up = _interleaved(BLOCK_N, SHARDS, SWAP)
    row += offset
    real_row = (row >= 0) & (row < SIZE)
    row += is_up * SIZE
    w_ptrs = w13_ptr + expert * (SHARDS * SIZE * K) + row[:, None] * K + k[None, :]
    group = tile * BLOCK_N // BLOCK
    gate_scale_ptr = w13_scale_ptr + (expert * SHARDS * NUM_BLOCKS + group) * K_BLOCKS
    up_scale_ptr = gate_scale_ptr + NUM_BLOCKS * K_BLOCKS
    gate = _zeros(BLOCK_M, BLOCK_N, SWAP)
    up = gate
    zeros = _zeros(BLOCK_M, SHARDS * BLOCK_N, SWAP)
    split = pid // TILES % SPLITS
    FIRST_BLOCK = split * (K_BLOCKS // SPLITS)
    HALFWAY: tl.constexpr = K_BLOCKS // SPLITS // UNROLL // 2 * UNROLL
    for first in tl.range(0, K_BLOCKS // SPLITS, UNROLL, num_stages=NUM_STAGES):
        if PLACED == "alone" and first == HALFWAY:
            let_next_start(USE_PDL)
        for i in tl.static_range(UNROLL):
            block = FIRST_BLOCK + first + i
            x = tl.load(x_ptrs + block * BLOCK, mask=is_pair[:, None], other=0.0)
            w = tl.load(w_ptrs + block * BLOCK, mask=real_row[:, None], other=0.0)
            x_scale = tl.load(x_scale_ptrs + block, mask=is_pair, other=0.0)
            both = _dot(x, w, zeros, SWAP)
            gate_part, up_part = _gate_and_up(both, BLOCK_M, BLOCK_N, SHARDS, SWAP)
            gate_scale = x_scale * tl.load(gate_scale_ptr + block)
            gate += gate_part * _per_pair(gate_scale, SWAP)
            if SHARDS == 2:
                up_scale = x_scale * tl.load(up_scale_ptr + block)
                up += up_part * _per_pair(up_scale, SWAP)

    if SWAP:
        gate = tl.trans(gate)
        up = tl.trans(up)
    column = offset + tl.arange(0, BLOCK_N)
    real = (column >= 0) & (column < SIZE)
    mask = is_pair[:, None] & real[None, :]
    where = pair.to(tl.int64)[:, None] * SIZE + column[None, :]
    if SPLITS == 1:
        h = activated(gate, up, ACTIVATION, LIMIT, ALPHA, BETA)
        tl.store(h_ptr + where, h.to(h_ptr.dtype.element_ty), mask=mask)
    else:
        where += split * SHARDS * num_pairs * SIZE
        tl.store(h_ptr + where, gate, mask=mask)
        if SHARDS == 2:
            tl.store(h_ptr + num_pairs * SIZE + where, up, mask=mask)


@triton.jit
def _real_columns(block: tl.constexpr, SIZE: tl.constexpr, LEAD: tl.constexpr):
    """Columns of the store that a quant block has, the half without any left out."""
    first: tl.constexpr = block * BLOCK
    if first + HALF <= LEAD:
        return tl.arange(0, HALF) + (first + HALF - LEAD)
    elif first + HALF >= LEAD + SIZE:
        return tl.arange(0, HALF) + (first - LEAD)
    else:
        return tl.arange(0, BLOCK) + (first - LEAD)


@triton.jit
def _load_columns(row_ptrs, rows, column, SIZE: tl.constexpr):
    """``[rows, columns]``, zero where there is none."""
    real = (column >= 0) & (column < SIZE)
    return tl.load(
        row_ptrs[:, None] + column[None, :],
        mask=rows[:, None] & real[None, :],
        other=0.0,
    )


@triton.jit
def _load_part(
    h_ptr,
    rows,
    is_pair,
    column,
    stride,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The sum of what programs that share a tile of gate or of up have written."""
    total = tl.zeros([rows.shape[0], column.shape[0]], tl.float32)
    for split in tl.static_range(SPLITS):
        part_ptrs = h_ptr + split * stride + rows * SIZE
        total += _load_columns(part_ptrs, is_pair, column, SIZE)
    return total


@triton.jit
def _load_h(
    h_ptr,  # [num_pairs, SIZE], or [SPLITS, SHARDS, num_pairs, SIZE] fp32
    pair,
    is_pair,
    weight,
    SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARDS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    num_pairs,
    dtype: tl.constexpr,
):
    """Operands of down: codes and scales of each block, scales times weights.

    What comes after ``SPLITS`` is for several of them. It has no defaults: Triton 3.6
    takes no strings for them.
    """
    codes = ()
    scales = ()
    pair = pair.to(tl.int64)
    for block in tl.static_range(NUM_BLOCKS):
        column = _real_columns(block, SIZE, LEAD)
        if SPLITS == 1:
            h = _load_columns(h_ptr + pair * SIZE, is_pair, column, SIZE)
        else:
            stride = SHARDS * num_pairs * SIZE
            gate = _load_part(h_ptr, pair, is_pair, column, stride, SIZE, SPLITS)
            up = gate
            if SHARDS == 2:
                up_rows = num_pairs + pair
                up = _load_part(h_ptr, up_rows, is_pair, column, stride, SIZE, SPLITS)
            h = activated(gate, up, ACTIVATION, LIMIT, ALPHA, BETA).to(dtype)
        block_codes, scale = quantize_rows(h.to(tl.float32), USE_UE8M0=False)
        codes = codes + (block_codes,)
        scales = scales + (scale * weight,)
    return codes, scales


@triton.jit
def _load_whole_h(
    h_ptr,
    pair,
    is_pair,
    weight,
    SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """``_load_h`` of what is activated already, as no program shared a tile of it."""
    return _load_h(
        *(h_ptr, pair, is_pair, weight, SIZE, LEAD, NUM_BLOCKS),
        *(1, 2, "silu", None, 1, 0, 0, None),
    )


@triton.jit
def _no_h(
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """What ``_load_h`` returns, before it has: a loop needs their types."""
    codes = ()
    scales = ()
    for block in tl.static_range(NUM_BLOCKS):
        column = _real_columns(block, SIZE, LEAD)
        zeros = tl.zeros([ROWS, column.shape[0]], tl.float32)
        codes = codes + (zeros.to(tl.float8e4nv),)
        scales = scales + (tl.zeros([ROWS], tl.float32),)
    return codes, scales


@triton.jit
def _times_w2(
    codes,
    scales,
    row_ptrs,
    rows,
    w_scale_ptr,
    SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """``h @ down.T`` for rows of down that share a row of quant blocks."""
    zeros = _zeros(codes[0].shape[0], rows.shape[0], SWAP)
    out = zeros
    for block in tl.static_range(NUM_BLOCKS):
        w = _load_columns(row_ptrs, rows, _real_columns(block, SIZE, LEAD), SIZE)
        part = _dot(codes[block], w, zeros, SWAP) * _per_pair(scales[block], SWAP)
        out += part * tl.load(w_scale_ptr + block)
    return out


@triton.jit(do_not_specialize=["num_pairs"])
def down_kernel(
    h_ptr,  # [num_pairs, SIZE] bf16/fp16/fp32
    w2_ptr,  # [experts, K, SIZE] fp8
    w2_scale_ptr,  # [experts, K // 128, NUM_BLOCKS] fp32
    y_ptr,  # [num_pairs, K] bf16/fp16/fp32, out
    topk_weights_ptr,  # [num_pairs] fp32
    sorted_pairs_ptr,
    block_experts_ptr,
    num_blocks_ptr,
    topk_ids_ptr,
    num_pairs,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SWAP: tl.constexpr,
    PLACED: tl.constexpr,
    BINS: tl.constexpr,
    PAIRS: tl.constexpr,
    MUL_WEIGHT: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """``h @ down.T``, times the router's weight, for one block of sorted pairs.

    Grid: ``blocks of pairs * SPLITS``. A program holds the block's activations,
    quantized, and walks over its ``K // SPLITS`` output columns.
    """
    pid = tl.program_id(0)
    pair, expert = block_of_pairs(
        pid // SPLITS,
        sorted_pairs_ptr,
        block_experts_ptr,
        num_blocks_ptr,
        topk_ids_ptr,
        num_pairs,
        BLOCK_M,
        PLACED,
        EXPERTS,
        BINS,
        PAIRS,
    )
    if expert < 0:
        # Else, where all programs end here, what follows could overtake gate and up.
        wait_for_previous(USE_PDL)
        return

    is_pair = pair < num_pairs
    weight = 1.0
    if MUL_WEIGHT:
        weight = tl.load(topk_weights_ptr + pair, mask=is_pair, other=0.0)
    if USE_PDL:
        codes, scales = _no_h(BLOCK_M, SIZE, LEAD, NUM_BLOCKS)
    else:
        codes, scales = _load_whole_h(
            h_ptr, pair, is_pair, weight, SIZE, LEAD, NUM_BLOCKS
        )
    y_ptrs = y_ptr + pair.to(tl.int64)[:, None] * K
    FIRST = (pid % SPLITS) * (K // SPLITS)
    for start in tl.range(0, K // SPLITS, BLOCK_N, num_stages=NUM_STAGES):
        # The first loads of weights are on their way by now.
        if USE_PDL and start == 0:
            wait_for_previous(USE_PDL)
            let_next_start(USE_PDL)
            codes, scales = _load_whole_h(
                h_ptr, pair, is_pair, weight, SIZE, LEAD, NUM_BLOCKS
            )
        row = FIRST + start + tl.arange(0, BLOCK_N)
        row_block = (FIRST + start) // BLOCK
        y = _times_w2(
            codes,
            scales,
            w2_ptr + (expert * K + row) * SIZE,
            row < K,
            w2_scale_ptr + (expert * (K // BLOCK) + row_block) * NUM_BLOCKS,
            SIZE,
            LEAD,
            NUM_BLOCKS,
            SWAP,
        )
        y = y.to(y_ptr.dtype.element_ty)
        if SWAP:
            y = tl.trans(y)
        tl.store(y_ptrs + row[None, :], y, mask=is_pair[:, None] & (row < K)[None, :])


@triton.jit
def down_and_sum_kernel(
    h_ptr,
    w2_ptr,
    w2_scale_ptr,
    out_ptr,  # [num_tokens, K] bf16/fp16/fp32, out
    topk_weights_ptr,
    topk_ids_ptr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SWAP: tl.constexpr,
    SHARDS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    MUL_WEIGHT: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One token's output: ``h @ down.T`` of its experts, weighted and summed.

    Grid: ``K // BLOCK_N * num_tokens``, tokens fastest, so that experts shared by
    tokens come from L2. The token's slots are the rows of one operand; the
    product with a slot's expert counts in that slot's row only.
    """
    num_tokens = tl.num_programs(0) // (K // BLOCK_N)
    token = tl.program_id(0) % num_tokens
    start = tl.program_id(0) // num_tokens * BLOCK_N
    slot = tl.arange(0, ROWS)
    pair = token * TOP_K + slot
    ids = tl.load(topk_ids_ptr + pair, mask=slot < TOP_K, other=-1).to(tl.int32)
    is_pair = expert_of(ids, EXPERTS) >= 0
    weight = 1.0
    if MUL_WEIGHT:
        weight = tl.load(topk_weights_ptr + pair, mask=is_pair, other=0.0)
    if USE_PDL:
        codes, scales = _no_h(ROWS, SIZE, LEAD, NUM_BLOCKS)
    else:
        codes, scales = _load_h(
            *(h_ptr, pair, is_pair, weight, SIZE, LEAD, NUM_BLOCKS),
            *(SPLITS, SHARDS, ACTIVATION, LIMIT, ALPHA, BETA),
            *(num_tokens * TOP_K, out_ptr.dtype.element_ty),
        )
    row = start + tl.arange(0, BLOCK_N)
    out = _zeros(ROWS, BLOCK_N, SWAP)
    for one in tl.range(0, TOP_K, num_stages=NUM_STAGES):
        if USE_PDL and one == 0:
            wait_for_previous(USE_PDL)
            let_next_start(USE_PDL)
            codes, scales = _load_h(
                *(h_ptr, pair, is_pair, weight, SIZE, LEAD, NUM_BLOCKS),
                *(SPLITS, SHARDS, ACTIVATION, LIMIT, ALPHA, BETA),
                *(num_tokens * TOP_K, out_ptr.dtype.element_ty),
            )
        routed = tl.load(topk_ids_ptr + token * TOP_K + one).to(tl.int32)
        expert = expert_of(routed, EXPERTS)
        real_row = tl.where(expert >= 0, row, K)
        expert = tl.maximum(expert, 0).to(tl.int64)
        y = _times_w2(
            codes,
            scales,
            w2_ptr + (expert * K + row) * SIZE,
            real_row < K,
            w2_scale_ptr + (expert * (K // BLOCK) + start // BLOCK) * NUM_BLOCKS,
            SIZE,
            LEAD,
            NUM_BLOCKS,
            SWAP,
        )
        out += tl.where(_per_pair(slot == one, SWAP), y, 0.0)
    if SWAP:
        out = tl.trans(out)
    total = tl.sum(out, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64) * K + row, total, mask=row < K)


@triton.jit
def sum_kernel(
    y_ptr,  # [num_tokens, TOP_K, K]
    out_ptr,  # [num_tokens, K], out
    topk_ids_ptr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Sum a token's slots that have an expert here, in fp32.

    Grid: ``num_tokens * ceil(K / BLOCK_N)``.
    """
    wait_for_previous(USE_PDL)
    let_next_start(USE_PDL)
    TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    token = (tl.program_id(0) // TILES).to(tl.int64)
    column = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for slot in tl.static_range(TOP_K):
        routed = tl.load(topk_ids_ptr + token * TOP_K + slot).to(tl.int32)
        expert = expert_of(routed, EXPERTS)
        y = tl.load(y_ptr + (token * TOP_K + slot) * K + column, mask=column < K)
        total += tl.where(expert >= 0, y.to(tl.float32), 0.0)
    tl.store(
        out_ptr + token * K + column,
        total.to(out_ptr.dtype.element_ty),
        mask=column < K,
    )
