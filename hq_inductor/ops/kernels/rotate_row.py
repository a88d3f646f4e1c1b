"""A row of activations as e4m3, rotated, read from memory once.

Definition.  As of `hq_inductor.ops.kernels.activations`: the scale of a row is the largest norm of its tiles / 448.
Invariants.  A program has a row in registers, all tiles of it, padded to a power of two.
Why.         The scale is not known before the end of a row is. Two kernels, one for the scale, read the row twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import _SMALLEST, _signs, apply_prologue, hadamard


@triton.jit
def _statistics(x, mask, features, eps, PROLOGUE: tl.constexpr):
    """`hq_inductor.ops.kernels.activations.row_statistics` of a row that is there; `x` is zero where masked out."""
    mean = 0.0
    if PROLOGUE == "layer_norm":
        mean = tl.sum(tl.sum(x, 1), 0) / features
        x = tl.where(mask, x - mean, 0.0)
    return mean, 1.0 / tl.sqrt_rn(tl.sum(tl.sum(x * x, 1), 0) / features + eps)


@triton.jit(do_not_specialize=["in_features", "stride_norm", "period", "tiles", "eps"])
def rotate_row_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    gate_ptr,  # the same, rows stride_gm apart, or anything if the prologue has no gate
    norm_weight_ptr,  # [in_features], or anything if not HAS_WEIGHT; NORM_ROWS: rows stride_norm apart, one for period rows
    norm_bias_ptr,  # the same, or anything if not HAS_BIAS
    pre_scale_ptr,  # [in_features], or anything if not HAS_SCALE
    out_ptr,  # [M, tiles * TILE] e4m3
    scale_ptr,  # [M] fp32
    in_features,
    stride_xm,
    stride_gm,
    stride_norm,
    period,
    tiles,
    eps,
    TILES: tl.constexpr,  # a power of two from tiles up
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SEED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ADD_ONE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program m: one row."""
    if ALIGNED:
        # no change, but the compiler sees it
        in_features = in_features // 16 * 16
        stride_xm = stride_xm // 16 * 16
        stride_gm = stride_gm // 16 * 16
        stride_norm = stride_norm // 16 * 16
    m = tl.program_id(0).to(tl.int64)
    if NORM_ROWS:
        norm_weight_ptr += m // period * stride_norm
        norm_bias_ptr += m // period * stride_norm
    block = tl.arange(0, TILES * PARTS)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    column = block // PARTS * TILE + block % PARTS * BLOCK + place
    inside = (block // PARTS < tiles) & (block % PARTS * BLOCK < TILE) & (place >= 0)
    mask = inside & (column < in_features)
    x = tl.load(x_ptr + m * stride_xm + column, mask=mask, other=0.0).to(tl.float32)
    mean = 0.0
    inverse_deviation = 1.0
    if PROLOGUE == "rms_norm" or PROLOGUE == "rms_norm_cast" or PROLOGUE == "layer_norm":
        mean, inverse_deviation = _statistics(x, mask, in_features, eps, PROLOGUE)
    x = apply_prologue(
        x,
        gate_ptr + m * stride_gm,
        norm_weight_ptr,
        norm_bias_ptr,
        mean,
        inverse_deviation,
        column,
        mask,
        x_ptr.dtype.element_ty,
        PROLOGUE,
        ADD_ONE,
        HAS_WEIGHT,
        HAS_BIAS,
    )
    if HAS_SCALE:
        x = x * tl.load(pre_scale_ptr + column, mask=mask, other=0.0).to(tl.float32)
    # squares of large elements would overflow
    peak = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), _SMALLEST)
    reduced = x * (1.0 / peak)
    squares = tl.sum(tl.reshape(tl.sum(reduced * reduced, 1), [TILES, PARTS]), 1)
    scale = tl.maximum(tl.sqrt(tl.max(squares, 0)) * (peak / 448.0), _SMALLEST)
    tl.store(scale_ptr + m, scale)
    r = hadamard(x * _signs(place, SEED), TILES * PARTS, BLOCK) * ((1.0 / (BLOCK**0.5)) / scale)
    tl.store(out_ptr + m * (tiles * TILE) + column, r.to(tl.float8e4nv), mask=inside)
