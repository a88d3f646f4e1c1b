"""Randomized Hadamard transform of activations, quantized to int8 per tile, in the order the fused linear kernel reads.

Definition.  Per row m and tile t: `r = RHT(x * pre_scale)` (`hq_inductor.format.hadamard`), times sqrt(3) at even places for a2, whose
             codes leave it out; `act_scale = max |r| / 127`, `q = round(r / act_scale)`, ties to even. A tile of zeros has scale 0.
Storage.     `q`, int8 `[tiles * TILE / 64, M_PAD, 64]`: the 64 coefficients of a block stand as `[lane j][vector v % 2][8]`, so that one
             16-byte load gives a thread its B operands of two MMAs. `act_scale`, fp32 `[tiles, M_PAD]`. Rows M to M_PAD are zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _signs(index, SEED: tl.constexpr):
    """`hq_inductor.format.hadamard.rht_signs` of positions within a block: 1.0 or -1.0."""
    h = index.to(tl.uint32) * 0x9E3779B1 + ((SEED * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return 1.0 - 2.0 * ((h ^ (h >> 16)) & 1).to(tl.float32)


@triton.jit
def hadamard(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Unnormalized Hadamard transform of each row of `[ROWS, BLOCK]`; any power of two."""
    SPAN: tl.constexpr = BLOCK // 2
    if BLOCK == 1:
        return x
    else:
        # halves apart, transform both, halves together: H_2n = H_2 (x) H_n
        a, b = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, SPAN]), [0, 2, 1]))
        both = tl.permute(tl.join(a + b, a - b), [0, 2, 1])
        return tl.reshape(hadamard(tl.reshape(both, [2 * ROWS, SPAN]), 2 * ROWS, SPAN), [ROWS, BLOCK])


@triton.jit
def round_to_even(x):
    """Nearest integer of |x| < 2^22."""
    magic = 12582912.0  # 1.5 * 2^23: fp32 has no bits below the unit there
    return (x + magic) - magic


@triton.jit
def rotate(
    x_ptr,
    pre_scale_ptr,
    t,
    in_features,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SEED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """RHT of tile `t` of the row at `x_ptr`: fp32 `[PARTS, BLOCK]`, with its columns and their mask; `PARTS * BLOCK >= TILE`."""
    part = tl.arange(0, PARTS)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    column = t * TILE + part * BLOCK + place
    inside = (part * BLOCK < TILE) & (place >= 0)
    mask = inside & (column < in_features)
    x = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        x = x * tl.load(pre_scale_ptr + column, mask=mask, other=0.0).to(tl.float32)
    x = x * _signs(place, SEED)
    return hadamard(x, PARTS, BLOCK) * (1.0 / (BLOCK**0.5)), column, inside


@triton.jit(do_not_specialize=["M", "M_PAD", "in_features", "counters"])
def rotate_quantize_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    pre_scale_ptr,  # [in_features], or anything if not HAS_SCALE
    q_ptr,  # [tiles * TILE / 64, M_PAD, 64] int8
    act_scale_ptr,  # [tiles, M_PAD] fp32
    counter_ptr,  # [counters] int32, set to zero for the kernel that follows
    M,
    M_PAD,
    in_features,
    stride_xm,
    counters,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SEED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LATTICE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (m, t): one tile of one row."""
    if PDL:
        # the linear kernel may start on its tables and weights; what it reads of ours it waits for, as we do for what comes before
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(0)
    t = tl.program_id(1)
    if (m == 0) & (t == 0):
        for first in range(0, counters, 256):
            index = first + tl.arange(0, 256)
            tl.store(counter_ptr + index, index * 0, mask=index < counters)
    row_ptr = x_ptr + tl.minimum(m, M - 1).to(tl.int64) * stride_xm
    r, column, inside = rotate(row_ptr, pre_scale_ptr, t, in_features, TILE, BLOCK, PARTS, SEED, HAS_SCALE)
    if LATTICE == "a2":
        r = tl.where(column % 2 == 0, r * 1.7320508075688772, r)
    r = tl.where(m < M, r, 0.0)
    largest = tl.max(tl.max(tl.abs(r), 1), 0)
    q = round_to_even(r * tl.where(largest > 0, 127.0 / largest, 0.0)).to(tl.int8)
    rest = column % 64
    place = (column // 64).to(tl.int64) * M_PAD * 64 + m * 64 + (rest % 32) // 8 * 16 + rest // 32 * 8 + rest % 8
    tl.store(q_ptr + place, q, mask=inside)
    tl.store(act_scale_ptr + t * M_PAD + m, largest / 127.0)


@triton.jit(do_not_specialize=["in_features", "tiles"])
def rotate_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    pre_scale_ptr,  # [in_features], or anything if not HAS_SCALE
    out_ptr,  # [M, tiles * TILE]
    in_features,
    stride_xm,
    tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SEED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """Program (m, t): the rotation alone of one tile of one row, in the dtype of `out`."""
    m = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1)
    r, column, inside = rotate(x_ptr + m * stride_xm, pre_scale_ptr, t, in_features, TILE, BLOCK, PARTS, SEED, HAS_SCALE)
    tl.store(out_ptr + m * (tiles * TILE) + column, r.to(out_ptr.dtype.element_ty), mask=inside)
