"""The prologue, rotation and quantization of a few rows of activations by the very block that multiplies them, in shared memory.

Definition.  As `hq_inductor.ops.kernels.activations`, for tiles of 512 and prologues of `PROLOGUES_IN_PLACE`, whose weight is one row.
Why.         A kernel of its own costs a small layer at batch 1 a quarter of its time: its launch, a row's way to memory and back, and the
             wait for its last block. That every block rotates all rows again costs less, as long as they are few.
Work.        One element per thread, as `hq_inductor.ops.kernels.bits`. A warp takes a tile of a row: thread l holds its elements 8 l to
             8 l + 7 and 256 more. Differences of 1, 2, 4 and 256 are within a thread, the others across the warp.
Storage.     `codes`, from an address in shared memory on: int8 `[tiles * 8, ROWS, 64]`, blocks of 64 as the linear kernel reads them; then
             64 zeros, which rows that are not there read; then the scales, fp32 `[tiles, ROWS]`, and sums of squares `[NUM_WARPS, ROWS]`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import apply_prologue, is_gate, is_norm, signs_of
from .bits import INTERPRETED
from .shared import load_shared_float, store_shared, store_shared_float
from .warp import exchange, pack_bytes
from .wide import load_8_values

_INTERPRETED = tl.constexpr(INTERPRETED)
TILE = 512
PROLOGUES_IN_PLACE = ("none", "rms_norm", "rms_norm_cast", "silu_mul", "gelu_mul", "gelu_tanh_mul")


def rows_bytes(rows: int, tiles: int, num_warps: int) -> int:
    """Shared memory that so many rows take."""
    return rows * tiles * (TILE + 4) + 64 + 4 * num_warps * rows


@triton.jit
def zeros_address(address, tiles, ROWS: tl.constexpr):
    return address + tiles * (512 * ROWS)


@triton.jit
def scales_address(address, tiles, ROWS: tl.constexpr):
    return zeros_address(address, tiles, ROWS) + 64


@triton.jit
def _sum_of_warp(x, NUM_WARPS: tl.constexpr):
    for i in tl.static_range(5):
        x = x + exchange(x, 1 << i, NUM_WARPS)
    return x


@triton.jit
def _max_of_warp(x, NUM_WARPS: tl.constexpr):
    for i in tl.static_range(5):
        x = tl.maximum(x, exchange(x, 1 << i, NUM_WARPS))
    return x


@triton.jit
def _load_16(pointer, column, features, present):
    """The 16 elements of a thread in a tile that begins at `column`."""
    values = ()
    for half in tl.static_range(2):
        place = column + 256 * half
        values = values + load_8_values(pointer + place, present & (place < features))
    return values


@triton.jit
def sign_bits(lane, SEED: tl.constexpr):
    """Bit i of a thread's word: whether the sign of its i-th element changes."""
    bits = lane * 0
    for i in tl.static_range(16):
        flips = signs_of(256 * (i // 8) + 8 * lane + i % 8, SEED) < 0
        bits = bits | (flips.to(tl.int32) << i)
    return bits


@triton.jit
def _within_threads(values, SPAN: tl.constexpr):
    """Sums and differences of elements SPAN apart."""
    updated = ()
    for i in tl.static_range(16):
        if i // SPAN % 2 == 0:
            updated = updated + (values[i] + values[i + SPAN],)
        else:
            updated = updated + (values[i - SPAN] - values[i],)
    return updated


@triton.jit
def _across_threads(values, lane, DISTANCE: tl.constexpr, NUM_WARPS: tl.constexpr):
    factor = tl.where((lane & DISTANCE) != 0, -1.0, 1.0)
    updated = ()
    for i in tl.static_range(16):
        updated = updated + (exchange(values[i], DISTANCE, NUM_WARPS) + values[i] * factor,)
    return updated


@triton.jit
def _hadamard(values, lane, NUM_WARPS: tl.constexpr):
    """Unnormalized transform of the 512 elements of a warp, 16 per thread."""
    for stage in tl.static_range(4):
        values = _within_threads(values, 1 << stage)
    for stage in tl.static_range(5):
        values = _across_threads(values, lane, 1 << stage, NUM_WARPS)
    return values


@triton.jit
def _byte_of(x):
    """|x| < 128 to the nearest integer, ties to even, in the lowest byte."""
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def rotate_rows(
    x_ptr,  # [M, features], rows stride_xm apart, of 16-byte aligned rows
    gate_ptr,  # the same, rows stride_gm apart, or anything if the prologue has no gate
    norm_weight_ptr,  # [features], or anything if not HAS_WEIGHT
    pre_scale_ptr,  # [features], or anything if not HAS_SCALE
    address,  # in shared memory
    signs,  # `sign_bits`
    thread,
    M,
    features,
    tiles,
    stride_xm,
    stride_gm,
    eps,
    ROWS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ADD_ONE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LATTICE: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Rows 0 to ROWS - 1 of activations to shared memory, those from M on as zeros. Barriers of the block are in it and at its end."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    lane = thread % 32
    warp = thread // 32
    zeros = zeros_address(address, tiles, ROWS)
    scales = scales_address(address, tiles, ROWS)
    squares = scales + 4 * ROWS * tiles
    store_shared(zeros + lane % 16 * 4, lane * 0)
    if is_norm(PROLOGUE):
        for m in tl.static_range(ROWS):
            row_ptr = x_ptr + tl.minimum(m, M - 1) * stride_xm
            square = (lane * 0).to(tl.float32)
            for first in range(0, tiles, NUM_WARPS):
                t = first + warp
                values = _load_16(row_ptr, t * 512 + 8 * lane, features, t < tiles)
                for i in tl.static_range(16):
                    square += values[i] * values[i]
            store_shared_float(squares + 4 * (warp * ROWS + m), _sum_of_warp(square, NUM_WARPS))
        if not _INTERPRETED:
            tl.debug_barrier()
    for m in tl.static_range(ROWS):
        row = tl.minimum(m, M - 1)
        inverse_deviation = (lane * 0).to(tl.float32)
        if is_norm(PROLOGUE):
            for w in tl.static_range(NUM_WARPS):
                inverse_deviation += load_shared_float(squares + 4 * (w * ROWS + m))
            inverse_deviation = 1.0 / tl.sqrt_rn(inverse_deviation / features + eps)
        for first in range(0, tiles, NUM_WARPS):
            t = first + warp
            column = t * 512 + 8 * lane
            present = t < tl.where(m < M, tiles, 0)
            x = _load_16(x_ptr + row * stride_xm, column, features, present)
            gate = x
            gain = x
            pre_scale = x
            if is_gate(PROLOGUE):
                gate = _load_16(gate_ptr + row * stride_gm, column, features, present)
            if HAS_WEIGHT:
                gain = _load_16(norm_weight_ptr, column, features, present)
            if HAS_SCALE:
                pre_scale = _load_16(pre_scale_ptr, column, features, present)
            values = ()
            for i in tl.static_range(16):
                value = apply_prologue(x[i], gate[i], gain[i], x[i], 0.0, inverse_deviation, DTYPE, PROLOGUE, ADD_ONE, HAS_WEIGHT, False)
                if HAS_SCALE:
                    value = value * pre_scale[i]
                # a change of sign
                flipped = value.to(tl.int32, bitcast=True) ^ ((signs << (31 - i)) & -(1 << 31))
                values = values + (flipped.to(tl.float32, bitcast=True),)
            values = _hadamard(values, lane, NUM_WARPS)
            if LATTICE == "a2":
                scaled = ()
                for i in tl.static_range(16):
                    scaled = scaled + (values[i] * 1.7320508075688772 if i % 2 == 0 else values[i],)
                values = scaled
            largest = tl.abs(values[0])
            for i in tl.static_range(1, 16):
                largest = tl.maximum(largest, tl.abs(values[i]))
            largest = _max_of_warp(largest, NUM_WARPS)
            factor = tl.where(largest > 0, 127.0 / largest, 0.0)
            block = address + ((t * 8 + lane // 8) * ROWS + m) * 64 + (lane % 4 * 16 + lane % 8 // 4 * 8)
            for half in tl.static_range(2):
                codes = ()
                for i in tl.static_range(8):
                    codes = codes + (_byte_of(values[8 * half + i] * factor),)
                place = block + half * (4 * ROWS * 64)
                store_shared(place, pack_bytes(codes[0], codes[1], codes[2], codes[3]), t < tiles)
                store_shared(place + 4, pack_bytes(codes[4], codes[5], codes[6], codes[7]), t < tiles)
            # 512^-1/2 / 127
            store_shared_float(scales + 4 * (t * ROWS + m), largest * 0.00034798562066267103, (t < tiles) & (lane == 0))
    if not _INTERPRETED:
        tl.debug_barrier()
