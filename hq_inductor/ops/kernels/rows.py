"""Randomized Hadamard transform of activations for large batches, quantized in plain row-major order.

Definition.  `r = RHT(x * pre_scale)` (`hq_inductor.format.hadamard`) as `hq_inductor.ops.kernels.activations` has it.
             int8: per row and tile, `scale = max |r| / 127`, `q = round(r / scale)`, ties to even; times sqrt(3) at even places for a2.
             fp8:  per row, `scale = max |r| / 448`, `q = e4m3(r / scale)`.
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


@triton.jit(do_not_specialize=["in_features"])
def rotate_fp8_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    pre_scale_ptr,  # [in_features], or anything if not HAS_SCALE
    q_ptr,  # [M, COLUMNS] e4m3
    scale_ptr,  # [M] fp32
    in_features,
    stride_xm,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SEED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """Program m: one whole row, held in registers: its largest coefficient decides its scale."""
    m = tl.program_id(0).to(tl.int64)
    r, column, inside = rotate(x_ptr + m * stride_xm, pre_scale_ptr, 0, in_features, COLUMNS, BLOCK, PARTS, SEED, HAS_SCALE)
    scale = tl.maximum(tl.max(tl.max(tl.abs(r), 1), 0) / 448.0, _SMALLEST)
    q = tl.minimum(tl.maximum(r * (1.0 / scale), -448.0), 448.0)
    tl.store(q_ptr + m * COLUMNS + column, q.to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + m, scale)
