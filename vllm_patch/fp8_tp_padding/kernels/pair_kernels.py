# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Triton kernels before the experts' products: tokens quantized, pairs sorted.

A *pair* is one (token, top-k slot): pair ``p`` belongs to token ``p // top_k``. Sorted
by expert, pairs come in blocks of ``BLOCK_M``, each of one expert.
"""

from vllm.triton_utils import tl, triton

from . import fp8_quant
from .dependent_launch import let_next_start, wait_for_previous
from .fp8_quant import constant, quantize_rows

BLOCK = constant(fp8_quant.BLOCK)


@triton.jit
def expert_of(routed, EXPERTS: tl.constexpr):
    """The expert that a routed id names; -1 if it names none."""
    return tl.where((routed >= 0) & (routed < EXPERTS), routed, -1)


@triton.jit
def _count(
    chunk,
    topk_ids_ptr,
    counts_ptr,
    placed_ptr,
    num_pairs,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count each expert's pairs in one chunk; none has a place yet."""
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(topk_ids_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    expert = expert_of(ids, EXPERTS)
    counts = tl.histogram(tl.maximum(expert, 0), BINS, mask=expert >= 0)
    bins = tl.arange(0, BINS)
    tl.store(counts_ptr + chunk * BINS + bins, counts)
    if chunk == 0:
        tl.store(placed_ptr + bins, tl.zeros([BINS], tl.int32))


@triton.jit
def _quantize(
    part, x_ptr, x_codes_ptr, x_scale_ptr, K: tl.constexpr, GROUPS: tl.constexpr
):
    """Quantize GROUPS activation groups of a token."""
    PER_TOKEN: tl.constexpr = K // BLOCK // GROUPS
    token = (part // PER_TOKEN).to(tl.int64)
    group = part % PER_TOKEN * GROUPS + tl.arange(0, GROUPS)
    offset = token * K + group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offset).to(tl.float32)
    codes, scale = quantize_rows(x, USE_UE8M0=False)
    tl.store(x_codes_ptr + offset, codes)
    tl.store(x_scale_ptr + token * (K // BLOCK) + group, scale)


@triton.jit(do_not_specialize=["num_pairs", "chunks"])
def prepare_kernel(
    x_ptr,  # [num_tokens, K] bf16/fp16/fp32
    x_codes_ptr,  # [num_tokens, K] fp8, out
    x_scale_ptr,  # [num_tokens, K // 128] fp32, out
    topk_ids_ptr,  # [num_pairs] integers, -1 for padding tokens
    counts_ptr,  # [chunks, BINS] int32, out; None without CHUNK
    placed_ptr,  # [BINS] int32, out: zeros; None without CHUNK
    num_pairs,
    chunks,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Quantize tokens, and count each expert's pairs, in one launch.

    Grid: ``chunks`` programs that count ``CHUNK`` pairs each, then ``num_tokens *
    (K // 128 // GROUPS)`` programs of ``GROUPS`` activation groups each. A ``CHUNK``
    of 0 counts nothing.
    """
    wait_for_previous(USE_PDL)
    let_next_start(USE_PDL)
    pid = tl.program_id(0)
    if CHUNK == 0:
        _quantize(pid, x_ptr, x_codes_ptr, x_scale_ptr, K, GROUPS)
    elif pid < chunks:
        _count(
            *(pid, topk_ids_ptr, counts_ptr, placed_ptr, num_pairs),
            *(EXPERTS, BINS, CHUNK),
        )
    else:
        _quantize(pid - chunks, x_ptr, x_codes_ptr, x_scale_ptr, K, GROUPS)


@triton.jit(do_not_specialize=["num_pairs", "chunks"])
def sort_kernel(
    topk_ids_ptr,
    counts_ptr,
    placed_ptr,  # [BINS] int32, zero; each expert's pairs that have a place, out
    sorted_pairs_ptr,  # [max blocks * BLOCK_M] int32, out
    block_experts_ptr,  # [max blocks] int32, out: -1 for a block without pairs
    num_blocks_ptr,  # [1] int32, out
    num_pairs,
    chunks,
    CHUNKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Sort pairs by expert into whole blocks of ``BLOCK_M``, in groups of ``GROUP_M``.

    Grid: the larger of ``EXPERTS`` and ``ceil(num_pairs / PAIRS)``. A program places
    its pairs, in any order among those of their expert, and fills one expert's last
    group up with ``num_pairs``. ``CHUNKS`` is ``chunks`` rounded up to a power of two.
    """
    wait_for_previous(USE_PDL)
    let_next_start(USE_PDL)
    pid = tl.program_id(0)
    bins = tl.arange(0, BINS)
    all_chunks = tl.arange(0, CHUNKS)
    counts = tl.load(
        counts_ptr + all_chunks[:, None] * BINS + bins[None, :],
        mask=(all_chunks < chunks)[:, None] & (bins < EXPERTS)[None, :],
        other=0,
    )
    totals = tl.sum(counts, 0)
    blocks = (totals + GROUP_M - 1) // GROUP_M * (GROUP_M // BLOCK_M)
    firsts = tl.cumsum(blocks) - blocks
    if pid == 0:
        tl.store(num_blocks_ptr, tl.sum(blocks))
    if pid < EXPERTS:
        first = tl.sum(tl.where(bins == pid, firsts, 0))
        count = tl.sum(tl.where(bins == pid, totals, 0))
        num_groups = (count + GROUP_M - 1) // GROUP_M
        for block in range(num_groups * (GROUP_M // BLOCK_M)):
            expert_of_block = tl.where(block * BLOCK_M < count, pid, -1)
            tl.store(block_experts_ptr + first + block, expert_of_block)
        tail = (num_groups - 1) * GROUP_M + tl.arange(0, GROUP_M)
        unused = (tail >= count) & (tail >= 0)
        tl.store(sorted_pairs_ptr + first * BLOCK_M + tail, num_pairs, mask=unused)

    pair = pid * PAIRS + tl.arange(0, PAIRS)
    routed = tl.load(topk_ids_ptr + pair, mask=pair < num_pairs, other=-1)
    expert = expert_of(routed.to(tl.int32), EXPERTS)
    known = expert >= 0
    expert = tl.maximum(expert, 0)
    place = tl.gather(firsts, expert, 0) * BLOCK_M
    place += tl.atomic_add(placed_ptr + expert, 1, mask=known, sem="relaxed")
    tl.store(sorted_pairs_ptr + place, pair, mask=known)


@triton.jit
def _find_block(
    pid_m,
    topk_ids_ptr,
    num_pairs,
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Pairs and expert of a block, where ``sort_kernel`` would place them."""
    pair = tl.arange(0, PAIRS)
    routed = tl.load(topk_ids_ptr + pair, mask=pair < num_pairs, other=-1)
    expert = expert_of(routed.to(tl.int32), EXPERTS)
    counts = tl.histogram(tl.maximum(expert, 0), BINS, mask=expert >= 0)
    ends = tl.cumsum((counts + BLOCK_M - 1) // BLOCK_M)
    # So many experts have all their blocks before this one.
    mine = tl.sum((ends <= pid_m).to(tl.int32))
    first = tl.max(tl.where(ends <= pid_m, ends, 0))
    is_mine = expert == mine
    place = tl.cumsum(is_mine.to(tl.int32)) - 1 - (pid_m - first) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    chosen = is_mine[:, None] & (place[:, None] == row[None, :])
    pairs = tl.min(tl.where(chosen, pair[:, None], num_pairs), 0)
    return pairs, tl.where(mine < EXPERTS, mine, -1)


@triton.jit
def block_of_pairs(
    pid_m,
    sorted_pairs_ptr,
    block_experts_ptr,
    num_blocks_ptr,
    topk_ids_ptr,
    num_pairs,
    BLOCK_M: tl.constexpr,
    PLACED: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Pairs of a block and their expert, -1 if there is nothing to do.

    ``PLACED`` is ``sorted``, by ``sort_kernel``; ``found``, by each program among up to
    ``PAIRS``; or ``alone``: a block is one pair, and an expert's weights are read once
    for each of its pairs (mostly from L2).
    """
    row = tl.arange(0, BLOCK_M)
    if PLACED == "sorted":
        num_blocks = tl.load(num_blocks_ptr)
        place = pid_m * BLOCK_M + row
        pair = tl.load(
            sorted_pairs_ptr + place, mask=place < num_blocks * BLOCK_M, other=num_pairs
        )
        expert = tl.where(pid_m < num_blocks, tl.load(block_experts_ptr + pid_m), -1)
    elif PLACED == "found":
        pair, expert = _find_block(
            *(pid_m, topk_ids_ptr, num_pairs),
            *(BLOCK_M, EXPERTS, BINS, PAIRS),
        )
    else:
        pair = tl.where(row == 0, pid_m, num_pairs)
        routed = tl.load(topk_ids_ptr + pid_m).to(tl.int32)
        expert = expert_of(routed, EXPERTS)
    return pair, expert.to(tl.int64)
