"""Randomized Hadamard transform of activations, quantized to int8 per tile, in the order the fused linear kernel reads.

Definition.  Per row m and tile t: `r = RHT(prologue(x) * pre_scale)` (`hq_inductor.ops.prologue`, `hq_inductor.format.hadamard`),
             times sqrt(3) at even places for a2, whose codes leave it out; `act_scale = max |r| / 127`, `q = round(r / act_scale)`,
             ties to even. A tile of zeros has scale 0.
Storage.     `q`, int8 `[tiles * TILE / 64, M_PAD, 64]`: the 64 coefficients of a block stand as `[lane j][vector v % 2][8]`, so that one
             16-byte load gives a thread its B operands of two MMAs; or for a ring `[M_PAD / RING, tiles * TILE / 16, RING, 16]`
             (`hq_inductor.ops.kernels.warpgroup`): RING rows at a time, of each block of 32 coefficients the lower halves of the vectors,
             then the upper ones. `act_scale`, fp32 `[tiles, M_PAD]`. Rows M to M_PAD are zeros.
             For products of large batches rows stand as they are: in a floating point dtype; as int8 with the same scales; or as e4m3 with
             one scale per row, `max_t |r_t| / 448`, |r_t| the Euclidean norm of a tile. No coefficient exceeds its tile's norm; the
             transform keeps the norm, so it is known before; and what it is above the largest coefficient (4 to 8 times) costs a
             floating point format no precision.
             Few activations go tile by tile, by the kernels here; many, and e4m3, go row by row (`hq_inductor.ops.kernels.rotate_row`).
ALIGNED.     Features and distances of rows are multiples of 16: loads of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def sign_hash(index, SEED: tl.constexpr):
    """Bits of which the lowest is set where `hq_inductor.format.hadamard.rht_signs` is negative."""
    h = index.to(tl.uint32) * 0x9E3779B1 + ((SEED * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _signs(index, SEED: tl.constexpr):
    """`hq_inductor.format.hadamard.rht_signs` of positions within a block: 1.0 or -1.0."""
    return 1.0 - 2.0 * (sign_hash(index, SEED) & 1).to(tl.float32)


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


# features whose statistics are taken at a time: all of a row's loads of 16 bytes that a warp can have under way
_CHUNK = tl.constexpr(4096)
SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def row_statistics(x_ptr, features, eps, PROLOGUE: tl.constexpr):
    """(mean, 1 / sqrt(variance + eps)) of a row; for RMS norms the mean is 0 and the variance about 0."""
    # from any number that varies: loops carry tensors
    mean = features * 0.0
    spread = features * 0.0
    for first in range(0, features, _CHUNK):
        column = first + tl.arange(0, _CHUNK)
        mask = column < features
        x = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
        if PROLOGUE == "layer_norm":
            # chunks joined by their means and spreads (Chan): no difference of large squares
            count = tl.minimum(features - first, _CHUNK).to(tl.float32)
            chunk_mean = tl.sum(x, 0) / count
            away = tl.where(mask, x - chunk_mean, 0.0)
            step = chunk_mean - mean
            share = count / (first + count)
            mean += step * share
            spread += tl.sum(away * away, 0) + step * step * first * share
        else:
            spread += tl.sum(x * x, 0)
    return mean, 1.0 / tl.sqrt_rn(spread / tl.maximum(features, 1) + eps)


@triton.jit
def _gelu_tanh(x):
    # 1 + tanh(u) = 2 / (1 + exp(-2 u))
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def apply_prologue(
    x,
    gate_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean,
    inverse_deviation,
    column,
    mask,
    DTYPE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ADD_ONE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """`x`, fp32 columns of a row of `DTYPE`, after the prologue, fp32; zeros where masked out."""
    if PROLOGUE == "silu_mul" or PROLOGUE == "gelu_mul" or PROLOGUE == "gelu_tanh_mul":
        gate = tl.load(gate_ptr + column, mask=mask, other=0.0).to(tl.float32)
        if PROLOGUE == "silu_mul":
            gate = gate / (1.0 + tl.exp(-gate))
        elif PROLOGUE == "gelu_mul":
            gate = 0.5 * gate * (1.0 + tl.erf(0.7071067811865476 * gate))
        else:
            gate = _gelu_tanh(gate)
        x = (x * gate.to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
    elif PROLOGUE != "none":
        x = (x - mean) * inverse_deviation
        if PROLOGUE == "rms_norm_cast":
            x = x.to(DTYPE).to(tl.float32)
        if HAS_WEIGHT:
            gain = tl.load(norm_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
            if ADD_ONE:
                gain = gain + 1.0
            x = x * gain
        if HAS_BIAS:
            x = x + tl.load(norm_bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x.to(DTYPE).to(tl.float32), 0.0)
    return x


@triton.jit
def load_activations(
    x_ptr,
    gate_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean,
    inverse_deviation,
    column,
    mask,
    PROLOGUE: tl.constexpr,
    ADD_ONE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Columns of a row after the prologue, fp32; zeros where masked out."""
    return apply_prologue(
        tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32),
        gate_ptr,
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


@triton.jit
def rotate(
    x_ptr,
    gate_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    pre_scale_ptr,
    mean,
    inverse_deviation,
    t,
    in_features,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SEED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ADD_ONE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """RHT of tile `t` of the row at `x_ptr`: fp32 `[PARTS, BLOCK]`, with its columns and their mask; `PARTS * BLOCK >= TILE`."""
    part = tl.arange(0, PARTS)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    column = t * TILE + part * BLOCK + place
    inside = (part * BLOCK < TILE) & (place >= 0)
    mask = inside & (column < in_features)
    x = load_activations(
        x_ptr, gate_ptr, norm_weight_ptr, norm_bias_ptr, mean, inverse_deviation, column, mask, PROLOGUE, ADD_ONE, HAS_WEIGHT, HAS_BIAS
    )
    if HAS_SCALE:
        x = x * tl.load(pre_scale_ptr + column, mask=mask, other=0.0).to(tl.float32)
    x = x * _signs(place, SEED)
    return hadamard(x, PARTS, BLOCK) * (1.0 / (BLOCK**0.5)), column, inside


@triton.jit
def start_dependent(PDL: tl.constexpr, BEFORE_DECODER: tl.constexpr):
    """Wait for the kernel before, and let the one after start early.

    The linear kernel may start at once on its tables and weights; what it reads of ours it waits for. The decoder waits for nothing, but
    writes, to memory that kernels before us may have read: not before they are done.
    """
    if PDL:
        if not BEFORE_DECODER:
            gdc_launch_dependents()
        gdc_wait()
        if BEFORE_DECODER:
            gdc_launch_dependents()


@triton.jit(do_not_specialize=["M", "M_PAD", "in_features", "stride_norm", "period", "counters", "eps"])
def rotate_quantize_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    gate_ptr,  # the same, rows stride_gm apart, or anything if the prologue has no gate
    norm_weight_ptr,  # [in_features], or anything if not HAS_WEIGHT; NORM_ROWS: rows stride_norm apart, one for period rows
    norm_bias_ptr,  # the same, or anything if not HAS_BIAS
    pre_scale_ptr,  # [in_features], or anything if not HAS_SCALE
    q_ptr,  # [tiles * TILE / 64, M_PAD, 64] int8, or with RING [M_PAD / RING, tiles * TILE / 16, RING, 16]
    act_scale_ptr,  # [tiles, M_PAD] fp32
    counter_ptr,  # [counters] int32, set to zero for the kernel that follows
    M,
    M_PAD,
    in_features,
    stride_xm,
    stride_gm,
    stride_norm,
    period,
    counters,
    eps,
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
    LATTICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
    BEFORE_DECODER: tl.constexpr,
    RING: tl.constexpr,
):
    """Program (m, t): one tile of one row. A norm's statistics are taken anew by each: the row is in a cache near by."""
    start_dependent(PDL, BEFORE_DECODER)
    m = tl.program_id(0)
    t = tl.program_id(1)
    if (m == 0) & (t == 0):
        for first in range(0, counters, 256):
            index = first + tl.arange(0, 256)
            tl.store(counter_ptr + index, index * 0, mask=index < counters)
    if ALIGNED:
        # no change, but the compiler sees it
        in_features = in_features // 16 * 16
        stride_xm = stride_xm // 16 * 16
        stride_gm = stride_gm // 16 * 16
        stride_norm = stride_norm // 16 * 16
    row = tl.minimum(m, M - 1).to(tl.int64)
    row_ptr = x_ptr + row * stride_xm
    if NORM_ROWS:
        norm_weight_ptr += row // period * stride_norm
        norm_bias_ptr += row // period * stride_norm
    mean = 0.0
    inverse_deviation = 1.0
    if PROLOGUE == "rms_norm" or PROLOGUE == "rms_norm_cast" or PROLOGUE == "layer_norm":
        # rows that are padding have no statistics
        mean, inverse_deviation = row_statistics(row_ptr, tl.where(m < M, in_features, 0), eps, PROLOGUE)
    r, column, inside = rotate(
        row_ptr,
        gate_ptr + row * stride_gm,
        norm_weight_ptr,
        norm_bias_ptr,
        pre_scale_ptr,
        mean,
        inverse_deviation,
        t,
        in_features,
        TILE,
        BLOCK,
        PARTS,
        SEED,
        HAS_SCALE,
        PROLOGUE,
        ADD_ONE,
        HAS_WEIGHT,
        HAS_BIAS,
    )
    if LATTICE == "a2":
        r = tl.where(column % 2 == 0, r * 1.7320508075688772, r)
    r = tl.where(m < M, r, 0.0)
    largest = tl.max(tl.max(tl.abs(r), 1), 0)
    q = round_to_even(r * tl.where(largest > 0, 127.0 / largest, 0.0)).to(tl.int8)
    if RING > 0:
        half = (column // 32 * 2 + column % 8 // 4).to(tl.int64) + (m // RING).to(tl.int64) * (tl.num_programs(1) * (TILE // 16))
        place = half * (16 * RING) + (m % RING) * 16 + column % 32 // 8 * 4 + column % 4
    else:
        rest = column % 64
        place = (column // 64).to(tl.int64) * M_PAD * 64 + m * 64 + (rest % 32) // 8 * 16 + rest // 32 * 8 + rest % 8
    tl.store(q_ptr + place, q, mask=inside)
    tl.store(act_scale_ptr + t * M_PAD + m, largest / 127.0)


@triton.jit(do_not_specialize=["in_features", "eps"])
def row_statistics_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    statistics_ptr,  # [M, 2] fp32: mean, 1 / sqrt(variance + eps)
    in_features,
    stride_xm,
    eps,
    PROLOGUE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program m: the statistics of one row, for `rotate_kernel`, where many rows would make it costly to take them once per tile."""
    if ALIGNED:
        in_features = in_features // 16 * 16
        stride_xm = stride_xm // 16 * 16
    m = tl.program_id(0).to(tl.int64)
    mean, inverse_deviation = row_statistics(x_ptr + m * stride_xm, in_features, eps, PROLOGUE)
    tl.store(statistics_ptr + 2 * m, mean)
    tl.store(statistics_ptr + 2 * m + 1, inverse_deviation)


@triton.jit(do_not_specialize=["in_features", "stride_norm", "period", "tiles"])
def fp8_scale_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    gate_ptr,  # the same, rows stride_gm apart, or anything if the prologue has no gate
    norm_weight_ptr,  # [in_features], or anything if not HAS_WEIGHT; NORM_ROWS: rows stride_norm apart, one for period rows
    norm_bias_ptr,  # the same, or anything if not HAS_BIAS
    statistics_ptr,  # [M, 2] fp32, or anything if the prologue is no norm
    pre_scale_ptr,  # [in_features], or anything if not HAS_SCALE
    scale_ptr,  # [M] fp32
    in_features,
    stride_xm,
    stride_gm,
    stride_norm,
    period,
    tiles,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ADD_ONE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program m: the scale of a row of e4m3; `PADDED` is the power of two from TILE up."""
    if ALIGNED:
        in_features = in_features // 16 * 16
        stride_xm = stride_xm // 16 * 16
        stride_gm = stride_gm // 16 * 16
        stride_norm = stride_norm // 16 * 16
    m = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PADDED)
    if NORM_ROWS:
        norm_weight_ptr += m // period * stride_norm
        norm_bias_ptr += m // period * stride_norm
    mean = 0.0
    inverse_deviation = 1.0
    if PROLOGUE == "rms_norm" or PROLOGUE == "rms_norm_cast" or PROLOGUE == "layer_norm":
        mean = tl.load(statistics_ptr + 2 * m)
        inverse_deviation = tl.load(statistics_ptr + 2 * m + 1)
    row_ptr = x_ptr + m * stride_xm
    gate_row_ptr = gate_ptr + m * stride_gm
    scale = tl.full([], SMALLEST, tl.float32)
    for t in range(tiles):
        column = t * TILE + place
        mask = (place < TILE) & (column < in_features)
        x = load_activations(
            row_ptr,
            gate_row_ptr,
            norm_weight_ptr,
            norm_bias_ptr,
            mean,
            inverse_deviation,
            column,
            mask,
            PROLOGUE,
            ADD_ONE,
            HAS_WEIGHT,
            HAS_BIAS,
        )
        if HAS_SCALE:
            x = x * tl.load(pre_scale_ptr + column, mask=mask, other=0.0).to(tl.float32)
        # squares of large elements would overflow
        peak = tl.maximum(tl.max(tl.abs(x), 0), SMALLEST)
        x = x / peak
        scale = tl.maximum(scale, tl.sqrt(tl.sum(x * x, 0)) * (peak / 448.0))
    tl.store(scale_ptr + m, scale)


@triton.jit(do_not_specialize=["in_features", "stride_norm", "period", "tiles"])
def rotate_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    gate_ptr,  # the same, rows stride_gm apart, or anything if the prologue has no gate
    norm_weight_ptr,  # [in_features], or anything if not HAS_WEIGHT; NORM_ROWS: rows stride_norm apart, one for period rows
    norm_bias_ptr,  # the same, or anything if not HAS_BIAS
    statistics_ptr,  # [M, 2] fp32, or anything if the prologue is no norm
    pre_scale_ptr,  # [in_features], or anything if not HAS_SCALE
    out_ptr,  # [M, tiles * TILE]
    scale_ptr,  # int8: [tiles, M] fp32, written; e4m3: [M] fp32, read; else anything
    in_features,
    stride_xm,
    stride_gm,
    stride_norm,
    period,
    tiles,
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
    LATTICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (m, t): one tile of one row, in plain order and the dtype of `out`."""
    start_dependent(PDL, True)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    if ALIGNED:
        in_features = in_features // 16 * 16
        stride_xm = stride_xm // 16 * 16
        stride_gm = stride_gm // 16 * 16
        stride_norm = stride_norm // 16 * 16
    m = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1)
    if NORM_ROWS:
        norm_weight_ptr += m // period * stride_norm
        norm_bias_ptr += m // period * stride_norm
    mean = 0.0
    inverse_deviation = 1.0
    if PROLOGUE == "rms_norm" or PROLOGUE == "rms_norm_cast" or PROLOGUE == "layer_norm":
        mean = tl.load(statistics_ptr + 2 * m)
        inverse_deviation = tl.load(statistics_ptr + 2 * m + 1)
    r, column, inside = rotate(
        x_ptr + m * stride_xm,
        gate_ptr + m * stride_gm,
        norm_weight_ptr,
        norm_bias_ptr,
        pre_scale_ptr,
        mean,
        inverse_deviation,
        t,
        in_features,
        TILE,
        BLOCK,
        PARTS,
        SEED,
        HAS_SCALE,
        PROLOGUE,
        ADD_ONE,
        HAS_WEIGHT,
        HAS_BIAS,
    )
    if DTYPE == tl.int8:
        if LATTICE == "a2":
            r = tl.where(column % 2 == 0, r * 1.7320508075688772, r)
        largest = tl.max(tl.max(tl.abs(r), 1), 0)
        r = round_to_even(r * tl.where(largest > 0, 127.0 / largest, 0.0))
        tl.store(scale_ptr + t * tl.num_programs(0) + m, largest / 127.0)
    elif DTYPE == tl.float8e4nv:
        r = tl.minimum(tl.maximum(r * (1.0 / tl.load(scale_ptr + m)), -448.0), 448.0)
    tl.store(out_ptr + m * (tiles * TILE) + column, r.to(DTYPE), mask=inside)
