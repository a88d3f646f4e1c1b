"""Rows of activations, rotated, each read from memory once: e4m3, and int8 and floating point where there are many.

Definition.  As of `hq_inductor.ops.kernels.activations`, values and storage.
Invariants.  A program has a row in registers, all tiles of it, as `[BLOCKS, BLOCK]` with both padded to powers of two; a warp has whole
             blocks. A turn of the transform adds and subtracts coefficients whose numbers differ in a bit that is in a thread's registers;
             between turns, lanes of a warp exchange. No bit is due twice.
Why.         The scale of e4m3 and a norm's statistics are not known before the end of a row is: program by tile, a row is read twice.
             And of many rows it is instructions that take the time. Triton, left alone, exchanges for one bit after the other; with layouts
             of our own (Gluon) 512 coefficients are exchanged once, and once more as bytes, for stores of 16 bytes. A thread has the same
             columns of several blocks, whose signs it computes once.
Cost.        23 instructions per coefficient of bf16 without a prologue where a thread has 64. Tile by tile 57 for int8; for e4m3 38, and 10
             more for its scale (counted in SASS, Triton 3.6, sm_90).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .activations import SMALLEST, apply_prologue, sign_hash, start_dependent
from .bits import INTERPRETED

# the turn after the last: 16 bytes per thread side by side
STORE = tl.constexpr(-1)


@triton.constexpr_function
def _bits(number):
    """Logarithm of a power of two."""
    return number.bit_length() - 1


@triton.constexpr_function
def _registers(columns, blocks, turn):
    """Bits of a coefficient's number in a warp that a thread has in registers at a turn; from `columns` on of the number of the block.

    Args:
        columns, blocks: logarithms of a block's length, and of the blocks that a warp has.
        turn: of the transform; -1 for the store.
    """
    room = columns + blocks - 5
    if turn == STORE.value:
        return [*range(4), *reversed(range(4, columns + blocks))][:room]
    order = [0, 1, 2, *reversed(range(columns, columns + blocks)), *reversed(range(3, columns))]
    done: set[int] = set()
    for _ in range(turn):
        done |= set(order[:room])
        order = sorted(range(columns + blocks), key=lambda bit: (bit in done or bit >= columns, bit))
    return order[:room]


@triton.constexpr_function
def layout_of(BLOCKS, BLOCK, NUM_WARPS, TURN):
    """Registers, lanes and warps of `[BLOCKS, BLOCK]` coefficients: a warp has whole blocks."""
    warps, columns = _bits(NUM_WARPS), _bits(BLOCK)
    blocks = _bits(BLOCKS) - warps
    registers = _registers(columns, blocks, TURN)
    lanes = [bit for bit in range(columns + blocks) if bit not in registers]
    registers = sorted(registers)

    def base(bit):
        return [0, 1 << bit] if bit < columns else [1 << (bit - columns), 0]

    return gl.DistributedLinearLayout(
        [base(bit) for bit in registers],
        [base(bit) for bit in lanes],
        [base(columns + blocks + warp) for warp in range(warps)],
        [],
        [BLOCKS, BLOCK],
    )


@triton.constexpr_function
def turns_of(BLOCKS, BLOCK, NUM_WARPS):
    """Turns after which every bit of a block's columns was in registers."""
    columns = _bits(BLOCK)
    blocks = _bits(BLOCKS // NUM_WARPS)
    done, turns = set(), 0
    while not done >= set(range(columns)):
        done |= set(_registers(columns, blocks, turns))
        turns += 1
    return turns


@triton.constexpr_function
def is_due(BIT, BLOCKS, BLOCK, NUM_WARPS, TURN):
    """Whether a bit is in registers at a turn and was not before."""
    columns = _bits(BLOCK)
    blocks = _bits(BLOCKS // NUM_WARPS)
    return BIT in _registers(columns, blocks, TURN) and not any(BIT in _registers(columns, blocks, turn) for turn in range(TURN))


if INTERPRETED:
    _jit = triton.jit

    @triton.jit
    def _places(BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NUM_WARPS: tl.constexpr, TURN: tl.constexpr):
        return tl.arange(0, BLOCKS)[:, None], tl.arange(0, BLOCK)[None, :]

    @triton.jit
    def _exchange(x, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NUM_WARPS: tl.constexpr, TURN: tl.constexpr):
        return x

    @triton.jit
    def _numbers(x):
        return tl.arange(0, x.shape[0])

    @triton.jit
    def _threads(NUM_WARPS: tl.constexpr):
        return tl.arange(0, 32 * NUM_WARPS)

else:
    _jit = gluon.jit

    @gluon.jit
    def _places(BLOCKS: gl.constexpr, BLOCK: gl.constexpr, NUM_WARPS: gl.constexpr, TURN: gl.constexpr):
        LAYOUT: gl.constexpr = layout_of(BLOCKS, BLOCK, NUM_WARPS, TURN)
        block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, LAYOUT))
        return block[:, None], gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))[None, :]

    @gluon.jit
    def _exchange(x, BLOCKS: gl.constexpr, BLOCK: gl.constexpr, NUM_WARPS: gl.constexpr, TURN: gl.constexpr):
        return gl.convert_layout(x, layout_of(BLOCKS, BLOCK, NUM_WARPS, TURN))

    @gluon.jit
    def _numbers(x):
        """Of the elements of a vector, where they are."""
        return gl.arange(0, x.shape[0], layout=x.type.layout)

    @gluon.jit
    def _threads(NUM_WARPS: gl.constexpr):
        return gl.arange(0, 32 * NUM_WARPS, layout=gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))


@triton.jit
def _butterfly(x, BIT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums and differences of pairs whose column differs in a bit."""
    LOW: tl.constexpr = 1 << BIT
    HIGH: tl.constexpr = BLOCK // 2 // LOW
    a, b = tl.split(tl.permute(tl.reshape(x, [BLOCKS, HIGH, 2, LOW]), [0, 1, 3, 2]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [BLOCKS, BLOCK])


@triton.jit
def _hadamard(x, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NUM_WARPS: tl.constexpr):
    """Unnormalized transform of each row of `[BLOCKS, BLOCK]`, from the layout of turn 0 to that of the last one."""
    BITS: tl.constexpr = _bits(BLOCK)
    TURNS: tl.constexpr = turns_of(BLOCKS, BLOCK, NUM_WARPS)
    for turn in tl.static_range(TURNS):
        if turn > 0:
            x = _exchange(x, BLOCKS, BLOCK, NUM_WARPS, turn)
        for bit in tl.static_range(BITS):
            if is_due(bit, BLOCKS, BLOCK, NUM_WARPS, turn):
                x = _butterfly(x, bit, BLOCKS, BLOCK)
    return x


@triton.jit
def _statistics(x, mask, features, eps, PROLOGUE: tl.constexpr):
    """`hq_inductor.ops.kernels.activations.row_statistics` of a row that is there; `x` is zero where masked out."""
    mean = 0.0
    if PROLOGUE == "layer_norm":
        mean = tl.sum(tl.sum(x, 1), 0) / features
        x = tl.where(mask, x - mean, 0.0)
    return mean, 1.0 / tl.sqrt_rn(tl.sum(tl.sum(x * x, 1), 0) / features + eps)


@triton.jit
def _largest_square(x, TILES: tl.constexpr):
    """Of the norms of a row's tiles."""
    return tl.max(tl.sum(tl.reshape(x * x, [TILES, x.numel // TILES]), 1), 0)


@triton.jit
def _norm_scale(x, TILES: tl.constexpr):
    """The scale of a row of e4m3."""
    largest = _largest_square(x, TILES)
    unit = largest * 0.0 + 1.0
    if not ((largest > 2.0**-80) & (largest < 2.0**120)):
        # squares overflow or vanish
        unit = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), SMALLEST)
        largest = _largest_square(x / unit, TILES)
    return tl.maximum(tl.sqrt(largest) * (unit / 448.0), SMALLEST)


@triton.jit
def _in_order(q, RING: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns as they are stored for the linear kernels, within 64 or 32 of them."""
    if RING > 0:
        q = tl.permute(tl.reshape(q, [BLOCKS, BLOCK // 32, 4, 2, 4]), [0, 1, 3, 2, 4])
    else:
        q = tl.permute(tl.reshape(q, [BLOCKS, BLOCK // 64, 2, 4, 8]), [0, 1, 3, 2, 4])
    return tl.reshape(q, [BLOCKS, BLOCK])


@_jit(do_not_specialize=["M", "M_PAD", "in_features", "stride_norm", "period", "tiles", "counters", "eps"])
def rotate_row_kernel(
    x_ptr,  # [M, in_features], rows stride_xm apart
    gate_ptr,  # the same, rows stride_gm apart, or anything if the prologue has no gate
    norm_weight_ptr,  # [in_features], or anything if not HAS_WEIGHT; NORM_ROWS: rows stride_norm apart, one for period rows
    norm_bias_ptr,  # the same, or anything if not HAS_BIAS
    pre_scale_ptr,  # [in_features], or anything if not HAS_SCALE
    out_ptr,  # [M_PAD, tiles * TILE], or not PLAIN as rotate_quantize_kernel's
    scale_ptr,  # int8: [tiles, M_PAD] fp32; e4m3: [M] fp32; else anything
    counter_ptr,  # [counters] int32, set to zero for the kernel that follows
    M,
    M_PAD,
    in_features,
    stride_xm,
    stride_gm,
    stride_norm,
    period,
    tiles,
    counters,
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
    LATTICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
    BEFORE_DECODER: tl.constexpr,
    PLAIN: tl.constexpr,
    RING: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Program m: one row."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    BLOCKS: tl.constexpr = TILES * PARTS
    LAST: tl.constexpr = turns_of(BLOCKS, BLOCK, NUM_WARPS) - 1
    start_dependent(PDL, BEFORE_DECODER)
    m = tl.program_id(0)
    if not PLAIN and m == 0:
        for first in range(0, counters, 32 * NUM_WARPS):
            index = first + _threads(NUM_WARPS)
            tl.store(counter_ptr + index, index * 0, mask=index < counters)
    if ALIGNED:
        # no change, but the compiler sees it
        in_features = in_features // 16 * 16
        stride_xm = stride_xm // 16 * 16
        stride_gm = stride_gm // 16 * 16
        stride_norm = stride_norm // 16 * 16
    row = tl.minimum(m, M - 1).to(tl.int64)
    if NORM_ROWS:
        norm_weight_ptr += row // period * stride_norm
        norm_bias_ptr += row // period * stride_norm
    block, place = _places(BLOCKS, BLOCK, NUM_WARPS, 0)
    column = block // PARTS * TILE + block % PARTS * BLOCK + place
    # rows that are padding have no features
    features = tl.where(m < M, in_features, 0)
    mask = (block // PARTS < tiles) & (block % PARTS * BLOCK < TILE) & (column < features)
    x = tl.load(x_ptr + row * stride_xm + column, mask=mask, other=0.0).to(tl.float32)
    mean = 0.0
    inverse_deviation = 1.0
    if PROLOGUE == "rms_norm" or PROLOGUE == "rms_norm_cast" or PROLOGUE == "layer_norm":
        mean, inverse_deviation = _statistics(x, mask, in_features, eps, PROLOGUE)
    x = apply_prologue(
        x,
        gate_ptr + row * stride_gm,
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
    if DTYPE == tl.float8e4nv:
        scale = _norm_scale(x, TILES)
        tl.store(scale_ptr + m, scale)
    signs = ((sign_hash(place, SEED) << 31) | 0x3F800000).to(tl.float32, bitcast=True)
    r = _hadamard(x * signs, BLOCKS, BLOCK, NUM_WARPS)
    if DTYPE == tl.float8e4nv:
        # no coefficient exceeds the norm, so none is to be clamped
        r = (r * ((1.0 / (BLOCK**0.5)) / scale)).to(DTYPE)
    elif DTYPE == tl.int8:
        if LATTICE == "a2":
            block, place = _places(BLOCKS, BLOCK, NUM_WARPS, LAST)
            r = r * tl.where(place % 2 == 0, 1.7320508075688772, 1.0)
        r = tl.reshape(r * (1.0 / (BLOCK**0.5)), [TILES, PARTS * BLOCK])
        largest = tl.max(tl.abs(r), 1)
        t = _numbers(largest)
        tl.store(scale_ptr + t * M_PAD + m, largest / 127.0, mask=t < tiles)
        r = r * tl.where(largest > 0, 127.0 / largest, 0.0)[:, None]
        # rounded to even, the integer in the lower bits: no conversion, which are slow
        r = tl.reshape((r + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8), [BLOCKS, BLOCK])
    else:
        r = (r * (1.0 / (BLOCK**0.5))).to(DTYPE)
    if not PLAIN:
        r = _in_order(r, RING, BLOCKS, BLOCK)
    r = _exchange(r, BLOCKS, BLOCK, NUM_WARPS, STORE)
    block, place = _places(BLOCKS, BLOCK, NUM_WARPS, STORE)
    column = block // PARTS * TILE + block % PARTS * BLOCK + place
    inside = (block // PARTS < tiles) & (block % PARTS * BLOCK < TILE) & (place >= 0)
    if PLAIN:
        out_ptr += m.to(tl.int64) * (tiles * TILE) + column
    elif RING > 0:
        half = (column // 16).to(tl.int64) + (m // RING).to(tl.int64) * (tiles * (TILE // 16))
        out_ptr += half * (16 * RING) + (m % RING) * 16 + column % 16
    else:
        out_ptr += (column // 64).to(tl.int64) * M_PAD * 64 + m * 64 + column % 64
    tl.store(out_ptr, r, mask=inside)
