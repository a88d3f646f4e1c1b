"""Sums of a block, or of the blocks of a cluster that share its rows, through shared memory to the output.

Clusters.  Blocks of a cluster (sm_90) are on multiprocessors near each other at the same time and read each other's shared memory: where
           tiles of a row are split over blocks, their sums meet without a trip through global memory, which takes 5 to 6 us (H200). Each
           block adds up and stores its share of the outputs, parts in order: the result does not depend on timing.
Storage.   fp32 `[columns][rows + 4]`, rows of the weight side by side as in the output: a thread stores four of them. The 4 spread what a
           warp writes over all banks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED
from .memory import load_four, load_global, store_four, store_global
from .shared import load_shared_16, store_shared

PADDING = tl.constexpr(4)


def output_bytes(columns: int, rows: int) -> int:
    """Shared memory that the sums of a block take."""
    return 4 * columns * (rows + PADDING.value)


if INTERPRETED:

    @triton.jit
    def cluster_rank(x):
        return x

else:

    @triton.jit
    def cluster_rank(x):
        """Number of the block in its cluster, of the shape of `x`."""
        return tl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r,r", [x], tl.int32, is_pure=True, pack=1)


@triton.jit
def _sync_cluster(thread):
    """Wait for all threads of the cluster, and see what they wrote to their blocks' shared memory."""
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.u32 $0, $1;",
        "=r,r",
        [thread],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _leave_cluster(thread):
    """Wait until all threads of the cluster are here, whatever they wrote: a release would wait for what is on its way to global memory."""
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned; mov.u32 $0, $1;",
        "=r,r",
        [thread],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load_of_block(address, block, PARTS: tl.constexpr):
    """Four fp32 from 16 aligned bytes of the shared memory of a block of the cluster."""
    if PARTS > 1:
        return tl.inline_asm_elementwise(
            "{.reg .b32 there; mapa.shared::cluster.u32 there, $4, $5; ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [there];}",
            "=f,=f,=f,=f,r,r",
            [address, block],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:
        a, b, c, d = load_shared_16(address)
        return (
            a.to(tl.float32, bitcast=True),
            b.to(tl.float32, bitcast=True),
            c.to(tl.float32, bitcast=True),
            d.to(tl.float32, bitcast=True),
        )


@triton.jit
def meet_and_store(
    totals,
    thread,
    share,
    part,
    address,
    first_row,
    column,
    m0,
    M,
    N,
    total,
    bias_ptr,
    residual_ptr,
    stride_residual,
    out_ptr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SHARING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Sums of ROWS rows from `first_row` on and `8 BLOCKS` batch columns from `m0` on, as MMAs leave them, of all PARTS of a cluster.

    In each block SHARING times as many threads as rows need have a share of them, this one `share`.
    `address` is where they meet, in the shared memory of each block; nobody reads anything else there any more, nor is a copy under way.
    VECTOR: rows of all weights and distances of rows are multiples of 4, pointers aligned.
    """
    PITCH: tl.constexpr = ROWS + PADDING
    QUADS: tl.constexpr = 2 * BLOCKS * ROWS
    THREADS: tl.constexpr = 2 * ROWS * SHARING
    BYTES: tl.constexpr = 32 * BLOCKS * PITCH  # of a share
    SHARES: tl.constexpr = PARTS * SHARING
    lane = thread % 32
    # rows of a thread's first sum, before and after
    mine = address + share * BYTES + 4 * (PITCH * (2 * (lane % 4)) + thread // 32 % (ROWS // 16) * 16 + lane // 4)
    for b in tl.static_range(BLOCKS):
        for i in tl.static_range(4):
            store_shared(mine + 4 * (PITCH * (8 * b + i % 2) + 8 * (i // 2)), totals[4 * b + i].to(tl.int32, bitcast=True))
    if PARTS > 1:
        _sync_cluster(thread)
    else:
        tl.debug_barrier()
    TURNS: tl.constexpr = (QUADS + THREADS * PARTS - 1) // (THREADS * PARTS)
    # loads of a round are under way together, as many as there are registers for
    ROUND: tl.constexpr = 1 if TURNS % 2 or SHARES > 4 else 2 if TURNS % 4 or SHARES > 2 else 4
    for first in range(0, TURNS, ROUND):
        loaded = ()
        for u in tl.static_range(ROUND):
            quad = tl.minimum(((first + u) * PARTS + part) * THREADS + thread, QUADS - 1)
            place = address + 4 * (PITCH * (quad // (ROWS // 4)) + quad % (ROWS // 4) * 4)
            for s in tl.static_range(SHARES):
                loaded = loaded + _load_of_block(place + s % SHARING * BYTES, thread * 0 + s // SHARING, PARTS)
        for u in tl.static_range(ROUND):
            quad = ((first + u) * PARTS + part) * THREADS + thread
            inside = quad < QUADS
            quad = tl.minimum(quad, QUADS - 1)
            n = first_row + quad % (ROWS // 4) * 4
            m = m0 + quad // (ROWS // 4)
            inside = inside & (m < M)
            values = ()
            for i in tl.static_range(4):
                value = loaded[4 * SHARES * u + i]
                for s in tl.static_range(1, SHARES):
                    value += loaded[4 * (SHARES * u + s) + i]
                if HAS_BIAS:
                    value += load_global(bias_ptr + n + i, inside & (n + i < N)).to(tl.float32)
                values = values + (value,)
            if HAS_RESIDUAL:
                residual_row = residual_ptr + m.to(tl.int64) * stride_residual + (column + n)
                if VECTOR:
                    added = load_four(residual_row, inside & (n < N))
                else:
                    added = ()
                    for i in tl.static_range(4):
                        added = added + (load_global(residual_row + i, inside & (n + i < N)).to(tl.float32),)
                values = (values[0] + added[0], values[1] + added[1], values[2] + added[2], values[3] + added[3])
            out_row = out_ptr + m.to(tl.int64) * total + (column + n)
            if VECTOR:
                store_four(out_row, values[0], values[1], values[2], values[3], inside & (n < N))
            else:
                for i in tl.static_range(4):
                    store_global(out_row + i, values[i].to(out_ptr.dtype.element_ty), inside & (n + i < N))
    if PARTS > 1:
        # others read here, and what they read they have by now: nothing has to be seen by anybody
        _leave_cluster(thread)
