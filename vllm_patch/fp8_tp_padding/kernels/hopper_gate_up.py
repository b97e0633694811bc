# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A Gluon kernel for gate and up of many tokens on Hopper, whose warps specialize.

A program has a ring of ``STAGES`` stages in shared memory, each with one quant block
along ``K`` of 128 pairs and of the gate and up rows of 64 columns.

    warps    who                    waits for   then arrives at
    4        load                   ``empty``   ``full``: once for the bytes of
                                                weights, once for rows of pairs
    4 and 4  multiply 64 pairs by   ``full``    ``empty``: once each
             the same weights

Tiles lie on the checkpoint's grid, but where fewer hold the rank's columns from the
first one on: 176 columns from 48 are three, not four. Such a tile may have two quant
blocks. It adds in the order of ``gate_up_kernel``. Where it runs:
``warp_specialization.py``.
"""

from dataclasses import dataclass
from typing import Any

from vllm.triton_utils import triton

if triton:  # vLLM's lint wants Triton guarded; without, nobody imports this module.
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        mbarrier,
        tma,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import fp8_quant, masked_activation
from .tiles import SPECIALIZED_BLOCKS, SPECIALIZED_M
from .warp_specialization import TILE

BLOCK = gl.constexpr(fp8_quant.BLOCK)
# Pairs of a warpgroup, and of a program: two blocks of sorted pairs.
ROWS = gl.constexpr(SPECIALIZED_M)
PAIRS = gl.constexpr(SPECIALIZED_BLOCKS * SPECIALIZED_M)
COLUMNS = gl.constexpr(TILE.block_n)
STAGES = gl.constexpr(TILE.num_stages)
# Stages by which a loader arrives late, so that it does not wait for what it loads.
LATE = gl.constexpr(2)
LOADERS = gl.constexpr(4)
# Registers of a thread: ptxas gives all 168, of which loaders need few.
LOADER_REGISTERS = gl.constexpr(56)
REGISTERS = gl.constexpr(224)

# Of one source with the other kernels', which Gluon cannot call.
_activated = gluon.jit(masked_activation.activated.fn)
# Their names from Triton 3.8 on, and before.
_load_rows = getattr(async_copy, "async_load", None) or (
    async_copy.async_copy_global_to_shared
)
_load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.constexpr_function
def _operand(rank):
    return gl.NVMMASharedLayout(128, 8, rank)


@dataclass(frozen=True)
class Description:
    """How ``w13_desc`` of the kernel below describes ``w13``.

    Attributes:
        experts: Experts of the rank.
        size: Its columns.
        hidden: Hidden size.

    """

    experts: int
    size: int
    hidden: int

    def __call__(self, w13: Any) -> TensorDescriptor:
        """Return the descriptor.

        Args:
            w13: ``[experts, 2 * size, hidden]`` float8_e4m3fn, gate rows then up rows;
                or what has its address and dtype.

        """
        shape = [self.experts, self.size, 2, self.hidden]
        up = self.size * self.hidden
        box = [1, TILE.block_n, 2, fp8_quant.BLOCK]
        return TensorDescriptor(
            w13, shape, [2 * up, self.hidden, up, 1], box, _operand(4)
        )


@gluon.constexpr_function
def _accumulator(columns):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32])


@gluon.constexpr_function
def _loaded(warps):
    return gl.BlockedLayout([1, 16], [4, 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def _stored(columns):
    lanes = columns // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.constexpr_function
def start_of(size, lead):
    """First column of the first tile: 0, or before it, on the checkpoint's grid."""
    before = lead % TILE.block_n
    fewer = (size - 1) // TILE.block_n < (before + size - 1) // TILE.block_n
    return 0 if fewer else -before


@gluon.constexpr_function
def tiles_of(size, lead):
    """Tiles of a rank's columns."""
    return (size - 1 - start_of(size, lead)) // TILE.block_n + 1


@gluon.constexpr_function
def cut_of(size, lead):
    """Columns of a tile in the first of its two quant blocks; 0: it is in one."""
    return -(lead + start_of(size, lead)) % TILE.block_n


@gluon.jit
def _num_tiles(num_blocks_ptr, SIZES: gl.constexpr):
    """How many tiles all programs have."""
    return gl.load(num_blocks_ptr) * ROWS // PAIRS * tiles_of(SIZES[2], SIZES[3])


@gluon.jit
def _group_and_tile(t, SIZES: gl.constexpr):
    """Which 128 pairs a tile has, and which tile of columns it is."""
    TILES: gl.constexpr = tiles_of(SIZES[2], SIZES[3])
    return t // TILES, t % TILES


@gluon.jit
def _next(stage, phase):
    stage += 1
    wraps = stage == STAGES
    return gl.where(wraps, 0, stage), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _arrive_for(stage, late, full):
    """Say that rows are there, in the stage ``late`` stages before this one.

    cp.async writes them through the generic proxy, and wgmma reads through another.
    """
    hopper.fence_async_shared()
    mbarrier.arrive(full.index((stage + STAGES - late) % STAGES), count=1)


@gluon.jit
def _load_tiles(x_codes_ptr, w13_desc, places, ring, num_pairs, SIZES: gl.constexpr):
    """Fill the ring, for all tiles of the program."""
    sorted_pairs_ptr, block_experts_ptr, num_blocks_ptr = places
    x_ring, w_ring, full, empty = ring
    TOP_K: gl.constexpr = SIZES[0]
    K: gl.constexpr = SIZES[1]
    layout: gl.constexpr = _loaded(LOADERS)
    k = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    row = gl.arange(0, PAIRS, gl.SliceLayout(1, layout))
    num_tiles = _num_tiles(num_blocks_ptr, SIZES)
    stage = 0
    # What was never filled is empty.
    phase = 1
    loaded = 0
    for t in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        group, tile = _group_and_tile(t, SIZES)
        expert = gl.load(block_experts_ptr + group * (PAIRS // ROWS))
        offset = start_of(SIZES[2], SIZES[3]) + tile * COLUMNS
        pair = gl.load(sorted_pairs_ptr + group * PAIRS + row)
        is_pair = (pair < num_pairs)[:, None]
        # Offsets of 32 bits take half of the registers.
        token = (pair // TOP_K).to(gl.uint32)
        x_offset = (token * K)[:, None] + k.to(gl.uint32)[None, :]
        for start in range(0, K, BLOCK):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * COLUMNS * BLOCK)
            _load_box(w13_desc, [expert, offset, 0, start], bar, w_ring.index(stage))
            _load_rows(x_ring.index(stage), (x_codes_ptr + start) + x_offset, is_pair)
            async_copy.commit_group()
            if loaded >= LATE:
                async_copy.wait_group(LATE)
                _arrive_for(stage, LATE, full)
            loaded += 1
            stage, phase = _next(stage, phase)
    if loaded > 0:
        async_copy.wait_group(0)
        for late in gl.static_range(LATE):
            _arrive_for(stage, LATE - late, full)


@gluon.jit
def _multiply(x_ring, w_ring, full, stage, phase, zeros, ROW: gl.constexpr):
    """Start the product of one quant block along K."""
    mbarrier.wait(full.index(stage), phase)
    x = x_ring.index(stage).slice(ROW, ROWS)
    w = w_ring.index(stage).reshape([zeros.shape[1], BLOCK]).permute((1, 0))
    return hopper.warpgroup_mma(x, w, zeros, use_acc=False, is_async=True)


@gluon.jit
def _scale_rows(w13_scale_ptr, expert, tile, SIZES: gl.constexpr):
    """Where a tile's scales start: gate's and up's, then those of its second block."""
    K_BLOCKS: gl.constexpr = SIZES[1] // BLOCK
    NUM_BLOCKS: gl.constexpr = SIZES[4]
    position = SIZES[3] + start_of(SIZES[2], SIZES[3]) + tile * COLUMNS
    block = position // BLOCK
    gate_ptr = w13_scale_ptr + (expert * (2 * NUM_BLOCKS) + block) * K_BLOCKS
    up_ptr = gate_ptr + NUM_BLOCKS * K_BLOCKS
    if cut_of(SIZES[2], SIZES[3]) == 0:
        return gate_ptr, up_ptr
    else:
        # Where a tile has one only, or no column in the second, it is this one again.
        second = gl.minimum((position + COLUMNS - 1) // BLOCK, NUM_BLOCKS - 1)
        further = (second - block) * K_BLOCKS
        return gate_ptr, up_ptr, gate_ptr + further, up_ptr + further


@gluon.jit
def _scales(x_scale_ptrs, scale_rows, is_pair, block):
    scales = (gl.load(x_scale_ptrs + block, mask=is_pair, other=0.0),)
    for i in gl.static_range(len(scale_rows)):
        scales = scales + (gl.load(scale_rows[i] + block),)
    return scales


@gluon.jit
def _add(acc, part, scales, is_up, is_cut):
    x = scales[0]
    scale = gl.where(is_up, (x * scales[2])[:, None], (x * scales[1])[:, None])
    if len(scales) == 5:
        after = gl.where(is_up, (x * scales[4])[:, None], (x * scales[3])[:, None])
        scale = gl.where(is_cut, after, scale)
    return acc + part * scale


@gluon.jit
def _now(values):
    """Compute values before what follows: LLVM would put sums off."""
    return gl.inline_asm_elementwise(
        "// $0", "=f,0", [values], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _store(
    acc,
    h_ptr,
    sorted_pairs_ptr,
    num_pairs,
    tile,
    SIZES: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    SIZE: gl.constexpr = SIZES[2]
    START: gl.constexpr = start_of(SIZE, SIZES[3])
    gate, up = acc.reshape([ROWS, COLUMNS, 2]).split()
    h = _activated(gate, up, ACTIVATION[0], ACTIVATION[1], ACTIVATION[2], ACTIVATION[3])
    layout: gl.constexpr = _stored(COLUMNS)
    h = gl.convert_layout(h.to(h_ptr.dtype.element_ty), layout)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout)) + (START + tile * COLUMNS)
    real = column < SIZE
    if START < 0:
        real &= column >= 0
    pair = gl.load(sorted_pairs_ptr + row)
    mask = (pair < num_pairs)[:, None] & real[None, :]
    gl.store(h_ptr + pair.to(gl.int64)[:, None] * SIZE + column[None, :], h, mask=mask)


@gluon.jit
def _multiply_tiles(
    pointers,
    places,
    ring,
    num_pairs,
    SIZES: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ROW: gl.constexpr,
):
    """Multiply 64 pairs, from ROW on, of each of the program's tiles."""
    x_scale_ptr, w13_scale_ptr, h_ptr = pointers
    sorted_pairs_ptr, block_experts_ptr, num_blocks_ptr = places
    x_ring, w_ring, full, empty = ring
    TOP_K: gl.constexpr = SIZES[0]
    K: gl.constexpr = SIZES[1]
    K_BLOCKS: gl.constexpr = K // BLOCK
    N: gl.constexpr = 2 * COLUMNS
    layout: gl.constexpr = _accumulator(N)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    # A thread has two neighbouring columns of an accumulator: gate and up of one.
    row_of_w = gl.arange(0, N, gl.SliceLayout(0, layout))[None, :]
    is_up = row_of_w % 2 == 1
    is_cut = row_of_w // 2 >= cut_of(SIZES[2], SIZES[3])
    zeros = gl.zeros([ROWS, N], gl.float32, layout)
    num_tiles = _num_tiles(num_blocks_ptr, SIZES)
    stage = 0
    phase = 0
    for t in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        group, tile = _group_and_tile(t, SIZES)
        block_pairs_ptr = sorted_pairs_ptr + group * PAIRS + ROW
        if gl.load(block_pairs_ptr) < num_pairs:
            expert = gl.load(block_experts_ptr + group * (PAIRS // ROWS)).to(gl.int64)
            pair = gl.load(block_pairs_ptr + row)
            is_pair = pair < num_pairs
            x_scale_ptrs = x_scale_ptr + (pair // TOP_K) * K_BLOCKS
            scale_rows = _scale_rows(w13_scale_ptr, expert, tile, SIZES)
            acc = zeros
            # Scales are loaded a step ahead: products do not wait for them.
            scales = _scales(x_scale_ptrs, scale_rows, is_pair, 0)
            # Two products at a time: the second runs while the first is scaled and
            # added. None runs where the loop turns: ptxas would have each waited for.
            for block in range(0, K_BLOCKS, 2):
                one = _multiply(x_ring, w_ring, full, stage, phase, zeros, ROW)
                first = stage
                stage, phase = _next(stage, phase)
                two = _multiply(x_ring, w_ring, full, stage, phase, zeros, ROW)
                scales_2 = _scales(x_scale_ptrs, scale_rows, is_pair, block + 1)
                one = hopper.warpgroup_mma_wait(1, deps=(one,))
                mbarrier.arrive(empty.index(first), count=1)
                acc = _add(acc, one, scales, is_up, is_cut)
                following = gl.minimum(block + 2, K_BLOCKS - 1)
                scales = _scales(x_scale_ptrs, scale_rows, is_pair, following)
                acc = _now(acc)
                # It is full already: a loop, across which ptxas puts no sums off.
                mbarrier.wait(full.index(stage), phase)
                two = hopper.warpgroup_mma_wait(0, deps=(two,))
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _next(stage, phase)
                acc = _add(acc, two, scales_2, is_up, is_cut)
            _store(acc, h_ptr, block_pairs_ptr, num_pairs, tile, SIZES, ACTIVATION)
        else:
            for _ in range(K_BLOCKS):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _next(stage, phase)


@gluon.jit(do_not_specialize=["num_pairs"])
def hopper_gate_up_kernel(
    x_codes_ptr,  # [num_tokens, K] fp8
    x_scale_ptr,  # [num_tokens, K // 128] fp32
    w13_desc,  # of [experts, SIZE, 2, K] fp8, gate and up interleaved
    w13_scale_ptr,  # [experts, 2 * NUM_BLOCKS, K // 128] fp32
    h_ptr,  # [num_pairs, SIZE] bf16/fp16/fp32, out
    sorted_pairs_ptr,
    block_experts_ptr,
    num_blocks_ptr,
    num_pairs,
    TOP_K: gl.constexpr,
    K: gl.constexpr,
    SIZE: gl.constexpr,
    LEAD: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    BETA: gl.constexpr,
):
    """``activated(x @ gate.T, x @ up.T)`` for 128 pairs and 64 columns at a time.

    Grid: any number of programs, each of which takes the next tile that is left. Pairs
    are sorted as by ``sort_kernel`` in groups of two blocks of 64.
    """
    gl.static_assert(K % (2 * BLOCK) == 0, "products are started two at a time")
    x_ring = gl.allocate_shared_memory(
        gl.float8e4nv, [STAGES, PAIRS, BLOCK], _operand(2)
    )
    w_ring = gl.allocate_shared_memory(
        gl.float8e4nv, [STAGES, 1, COLUMNS, 2, BLOCK], _operand(4)
    )
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=2)
        mbarrier.init(empty.index(stage), count=2)
    hopper.fence_async_shared()
    places = (sorted_pairs_ptr, block_experts_ptr, num_blocks_ptr)
    ring = (x_ring, w_ring, full, empty)
    pointers = (x_scale_ptr, w13_scale_ptr, h_ptr)
    # One argument each: Triton makes tensors of what tuples with others hold.
    SIZES: gl.constexpr = (TOP_K, K, SIZE, LEAD, NUM_BLOCKS)
    HOW: gl.constexpr = (ACTIVATION, LIMIT, ALPHA, BETA)
    gl.warp_specialize(
        [
            (_multiply_tiles, (pointers, places, ring, num_pairs, SIZES, HOW, 0)),
            (_multiply_tiles, (pointers, places, ring, num_pairs, SIZES, HOW, ROWS)),
            (_load_tiles, (x_codes_ptr, w13_desc, places, ring, num_pairs, SIZES)),
        ],
        [4, LOADERS],
        [REGISTERS, LOADER_REGISTERS],
    )
