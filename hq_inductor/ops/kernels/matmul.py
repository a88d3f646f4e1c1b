"""int8 product of large batches with decoded codes, scaled tile by tile.

Definition.  `out[m, n] = bias[n] + sum_t act_scale[t, m] * scale[n, t] * (sum_k codes[n, t, k] * x[m, t, k])`: the fused kernel's layer
             (`hq_inductor.ops.kernels.linear`) from codes that stand in memory. Inner sums exact in int32, outer ones in fp32, in order
             of t.
Work.        A program computes BLOCK_M x BLOCK_N outputs, or with several parts (`num_programs(1)`) their sums over its part of the
             tiles, for the caller to add up. Programs of GROUP_M row blocks share columns while these are in the L2.
"""

from __future__ import annotations

import triton
import triton.language as tl


# one binary for all batches
@triton.jit(do_not_specialize=["M", "N", "tiles"])
def int8_matmul_kernel(
    x_ptr,  # [M, tiles * TILE] int8
    act_scale_ptr,  # [tiles, M] fp32
    codes_ptr,  # [N, tiles * TILE] int8
    scale_ptr,  # [N, tiles] fp32
    bias_ptr,  # [N], or anything if not HAS_BIAS
    out_ptr,  # [M, N], or for several parts [parts, M, N] fp32
    M,
    N,
    tiles,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    STEPS: tl.constexpr = TILE // BLOCK_K
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * blocks_n)
    first = group * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    rest = program % (GROUP_M * blocks_n)
    row = (first + rest % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (rest // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    # past the end: the last row and column again, not stored
    row_in = tl.minimum(row, M - 1)
    column_in = tl.minimum(column, N - 1)
    k = tl.arange(0, BLOCK_K)
    columns = tiles * TILE
    x_ptrs = x_ptr + row_in[:, None].to(tl.int64) * columns + k[None, :]
    codes_ptrs = codes_ptr + column_in[None, :].to(tl.int64) * columns + k[:, None]
    act_scale_ptrs = act_scale_ptr + row_in
    scale_ptrs = scale_ptr + column_in.to(tl.int64) * tiles
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    part = tl.program_id(1)
    first_tile = part * tiles // tl.num_programs(1)
    last_tile = (part + 1) * tiles // tl.num_programs(1)
    x_ptrs += first_tile * TILE
    codes_ptrs += first_tile * TILE
    act_scale_ptrs += first_tile * M
    scale_ptrs += first_tile
    for step in range((last_tile - first_tile) * STEPS):
        x = tl.load(x_ptrs)
        codes = tl.load(codes_ptrs)
        sums = tl.dot(x, codes, sums, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        codes_ptrs += BLOCK_K
        if step % STEPS == STEPS - 1:
            total += sums.to(tl.float32) * (tl.load(act_scale_ptrs)[:, None] * tl.load(scale_ptrs)[None, :])
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            act_scale_ptrs += M
            scale_ptrs += 1
    if HAS_BIAS:
        total += tl.load(bias_ptr + column_in)[None, :].to(tl.float32)
    inside = (row[:, None] < M) & (column[None, :] < N)
    tl.store(out_ptr + (part * M + row[:, None]).to(tl.int64) * N + column[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)
