"""Randomized Hadamard transform of activations for large batches, quantized in plain row-major order.

Definition.  `r = RHT(x * pre_scale)` (`hq_inductor.format.hadamard`) as `hq_inductor.ops.kernels.activations` has it.
             int8: per row and tile, `scale = max |r| / 127`, `q = round(r / scale)`, ties to even; times sqrt(3) at even places for a2.
             fp8:  per row, `scale = max_t |r_t| / 448`, |r_t| the Euclidean norm of a tile, and `q = e4m3(r / scale)`. No coefficient
                   exceeds its tile's norm; the transform keeps the norm, so it is known before; and what it is above the largest
                   coefficient (4 to 8 times) costs e4m3, a floating point format, no precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import rotate, round_to_even

_SMALLEST = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=["in_features", "tiles"])
def rotate_int8_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    pre_scale_ptr,  # [in_features], or anything if not HAS_SCALE
    q_ptr,  # [M, tiles * TILE] int8
    scale_ptr,  # [tiles, M] fp32
    in_features,
    stride_xm,
    tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SEED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LATTICE: tl.constexpr,
):
    """Program (m, t): one tile of one row."""
    m = tl.program_id(0)
    t = tl.program_id(1)
    r, column, inside = rotate(x_ptr + m.to(tl.int64) * stride_xm, pre_scale_ptr, t, in_features, TILE, BLOCK, PARTS, SEED, HAS_SCALE)
    if LATTICE == "a2":
        r = tl.where(column % 2 == 0, r * 1.7320508075688772, r)
    largest = tl.max(tl.max(tl.abs(r), 1), 0)
    q = round_to_even(r * tl.where(largest > 0, 127.0 / largest, 0.0)).to(tl.int8)
    tl.store(q_ptr + m.to(tl.int64) * (tiles * TILE) + column, q, mask=inside)
    tl.store(scale_ptr + t * tl.num_programs(0) + m, largest / 127.0)


@triton.jit(do_not_specialize=["in_features", "tiles"])
def fp8_scale_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    pre_scale_ptr,  # [in_features], or anything if not HAS_SCALE
    scale_ptr,  # [M] fp32
    in_features,
    stride_xm,
    tiles,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """Program m: the scale of a row; `PADDED` is the power of two from TILE up."""
    m = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PADDED)
    largest = 0.0
    for t in range(tiles):
        column = t * TILE + place
        mask = (place < TILE) & (column < in_features)
        x = tl.load(x_ptr + m * stride_xm + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            x = x * tl.load(pre_scale_ptr + column, mask=mask, other=0.0).to(tl.float32)
        # squares of large elements would overflow
        peak = tl.maximum(tl.max(tl.abs(x), 0), _SMALLEST)
        x = x / peak
        largest = tl.maximum(largest, tl.sqrt(tl.sum(x * x, 0)) * (peak / 448.0))
    tl.store(scale_ptr + m, tl.maximum(largest, _SMALLEST))


@triton.jit(do_not_specialize=["in_features", "tiles"])
def rotate_fp8_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    pre_scale_ptr,  # [in_features], or anything if not HAS_SCALE
    q_ptr,  # [M, tiles * TILE] e4m3
    scale_ptr,  # [M] fp32
    in_features,
    stride_xm,
    tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SEED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """Program (m, t): one tile of one row, by the row's scale."""
    m = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1)
    scale = tl.load(scale_ptr + m)
    r, column, inside = rotate(x_ptr + m * stride_xm, pre_scale_ptr, t, in_features, TILE, BLOCK, PARTS, SEED, HAS_SCALE)
    q = tl.minimum(tl.maximum(r * (1.0 / scale), -448.0), 448.0)
    tl.store(q_ptr + m * (tiles * TILE) + column, q.to(tl.float8e4nv), mask=inside)
