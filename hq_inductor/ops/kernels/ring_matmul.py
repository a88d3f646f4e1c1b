"""int8 product of large batches with decoded codes on sm_90: as `hq_inductor.ops.kernels.matmul`, both factors through a ring.

Storage.   Codes as `hq_inductor.ops.kernels.decode` writes them if BLOCKED, activations as for the fused kernel with a ring: what a step
           multiplies lies in one piece, and comes by bulk copies without a tensor map. Both have the fused kernel's order of coefficients.
Work.      A block of two groups of four warps computes 128 rows of the weight by COLUMNS rows of activations, 64 of the former each. While
           one of them scales the sums of a tile, the other multiplies. Blocks that are near each other in time share columns, up to WIDTH
           blocks of them.
Limit.     Shared memory: per chunk it gives 48 KiB to the tensor cores and takes 32 KiB, in more cycles than the products take. More
           columns would need more registers for sums than there are. Blocks that share activations in clusters were not faster (H100).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bits import INTERPRETED
from .block_memory import BLOCK_MEMORY, open_block, whole_memory_jit
from .blocks import add_tile, store_strip, zeros_of
from .memory import load_global
from .ring_output import meet_and_store
from .shared import shared_base
from .warpgroup import fill_pieces, multiply_chunk, open_ring, refill_pieces, release

_INTERPRETED = tl.constexpr(INTERPRETED)

# of a block, and rows of the second factor
MATMUL_WARPS = 8
MATMUL_COLUMNS = 128
# chunks of 128 coefficients in the ring
MATMUL_STAGES = 6
# blocks of columns that are near each other in time
WIDTH = tl.constexpr(16)
# chunks after which a slot is filled again: groups of warps may be so many apart
_LAG = tl.constexpr(1)
# KiB of shared memory: the ring and its barriers
MATMUL_KB = MATMUL_STAGES * (128 + MATMUL_COLUMNS) * 128 // 1024 + 1


@triton.jit
def _slot_before(slot, chunks: tl.constexpr, STAGES: tl.constexpr):
    """Slot of the chunk that is so many before."""
    return tl.where(slot < chunks, slot + (STAGES - chunks), slot - chunks)


@whole_memory_jit(do_not_specialize=["M", "M_PAD", "N", "N_PAD", "tiles"])
def ring_matmul_kernel(
    codes_ptr,  # [N_PAD / 64, tiles * TILE / 16, 64, 16] int8
    scale_ptr,  # [tiles, N_PAD] fp32
    x_ptr,  # [M_PAD / COLUMNS, tiles * TILE / 16, COLUMNS, 16] int8
    act_scale_ptr,  # [tiles, M_PAD] fp32
    bias_ptr,  # [N], or anything if not HAS_BIAS
    out_ptr,  # [M, N]
    M,
    M_PAD,
    N,
    N_PAD,
    tiles,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # of `meet_and_store`
    HAS_BIAS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    SHARED_KB: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs in order of their numbers: all rows of WIDTH blocks of columns, then of the next ones."""
    BLOCKS: tl.constexpr = COLUMNS // 8
    A_BYTES: tl.constexpr = 64 * 128  # of 64 rows, per chunk
    B_BYTES: tl.constexpr = COLUMNS * 128
    CHUNK: tl.constexpr = 2 * A_BYTES + B_BYTES
    CHUNKS: tl.constexpr = TILE // 128  # of a tile

    thread = open_block(NUM_WARPS, 1, SHARED_KB)
    rows = (N + 127) // 128
    columns = M_PAD // COLUMNS
    group = tl.program_id(0) // (WIDTH * rows)
    width = tl.minimum(columns - group * WIDTH, WIDTH)
    place = tl.program_id(0) - group * (WIDTH * rows)
    row_block = place // width
    column_block = group * WIDTH + place % width

    lane = thread % 32
    warp = thread // 32
    j = lane % 4
    strip = row_block * 8 + warp
    m0 = column_block * COLUMNS
    size = tiles * TILE
    # 64 rows each; past the last ones, these again
    first_a = codes_ptr + (row_block * 2).to(tl.int64) * (64 * size)
    second_a = codes_ptr + tl.minimum(row_block * 2 + 1, N_PAD // 64 - 1).to(tl.int64) * (64 * size)
    first_b = x_ptr + column_block.to(tl.int64) * (COLUMNS * size)
    slots = 0
    barriers = 0
    chunks = tiles * CHUNKS
    if not _INTERPRETED:
        slots = shared_base(M, BLOCK_MEMORY)
        barriers = slots + STAGES * CHUNK
        open_ring(barriers, thread, STAGES, NUM_WARPS)
        tl.debug_barrier()
    if PDL:
        gdc_wait()
    if not _INTERPRETED:
        for stage in tl.static_range(STAGES):
            fill_pieces(
                thread + tl.where(stage < chunks, 0, 256),
                barriers + 8 * stage,
                slots + CHUNK * stage,
                first_a + A_BYTES * stage,
                second_a + A_BYTES * stage,
                first_b + B_BYTES * stage,
                A_BYTES,
                B_BYTES,
            )

    totals = zeros_of(thread, 4 * BLOCKS)
    # rows that are not there have scales of others
    row_u = tl.minimum(strip * 16 + lane // 4, N_PAD - 1)
    row_v = tl.minimum(strip * 16 + 8 + lane // 4, N_PAD - 1)
    chunk = 0
    slot = 0
    parity = 0
    for t in range(tiles):
        scale_u = load_global(scale_ptr + t * N_PAD + row_u)
        scale_v = load_global(scale_ptr + t * N_PAD + row_v)
        column_ptr = act_scale_ptr + t * M_PAD + m0 + 2 * j
        scales = ()
        for b in tl.static_range(BLOCKS):
            scales = scales + (load_global(column_ptr + 8 * b), load_global(column_ptr + 8 * b + 1))
        sums = ()
        for _ in tl.static_range(4 * BLOCKS):
            sums = sums + (thread * 0,)
        for c in tl.static_range(CHUNKS):
            sums = multiply_chunk(
                sums,
                barriers + 8 * slot,
                parity,
                slots + CHUNK * slot,
                warp,
                first_a + A_BYTES * chunk,
                second_a + A_BYTES * chunk,
                first_b + B_BYTES * chunk,
                lane,
                c == 0,
                c == CHUNKS - 1,
                COLUMNS,
                NUM_WARPS,
            )
            # what is done: the chunk before, and this one at the end of the tile
            for done in tl.static_range(1 if c > 0 else 0, -1 if c == CHUNKS - 1 else 0, -1):
                release(barriers + 8 * _slot_before(slot, done, STAGES), lane, 8 * STAGES)
                # a slot that all are done with, or soon
                old = _slot_before(slot, done + _LAG, STAGES)
                new = chunk - done + (STAGES - _LAG)
                refill_pieces(
                    thread + tl.where((chunk - done >= _LAG) & (new < chunks), 0, 256),
                    barriers + 8 * old,
                    tl.where(old > slot, parity ^ 1, parity),
                    slots + CHUNK * old,
                    first_a + A_BYTES * new,
                    second_a + A_BYTES * new,
                    first_b + B_BYTES * new,
                    8 * STAGES,
                    A_BYTES,
                    B_BYTES,
                )
            chunk += 1
            ends = slot == STAGES - 1
            parity = tl.where(ends, parity ^ 1, parity)
            slot = tl.where(ends, 0, slot + 1)
        totals = add_tile(totals, sums, scale_u, scale_v, scales, BLOCKS)

    if PDL:
        gdc_launch_dependents()
    if _INTERPRETED:
        store_strip(totals, strip, strip >= 0, 0, m0, M, N, N, lane, bias_ptr, out_ptr, 0, out_ptr, BLOCKS, HAS_BIAS, False)
    else:
        # all warps are done with what is in shared memory
        tl.debug_barrier()
        meet_and_store(
            totals,
            thread,
            0,
            0,
            shared_base(thread, BLOCK_MEMORY),
            row_block * 128,
            0,
            m0,
            M,
            N,
            N,
            bias_ptr,
            out_ptr,
            0,
            out_ptr,
            BLOCKS,
            128,
            1,
            1,
            HAS_BIAS,
            False,
            VECTOR,
        )
