"""The fused linear kernel with shared memory as large as it likes: Gluon allocates it, `hq_inductor.ops.kernels.linear` is the rest.

Triton itself allocates shared memory only for its own conversions, and 48 KiB are the most that inline PTX may declare.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .linear import linear_block


@gluon.jit(do_not_specialize=["M", "M_PAD", "N", "N1", "N2", "N3", "tiles"])
def ring_linear_kernel(
    words_ptr,
    table_ptr,
    x_ptr,
    act_scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    M_PAD,
    N,
    tiles,
    residual_ptr,
    stride_residual,
    words1_ptr,
    words2_ptr,
    words3_ptr,
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    N1,
    N2,
    N3,
    LATTICE: gl.constexpr,
    K: gl.constexpr,
    SHIFT: gl.constexpr,
    GAIN: gl.constexpr,
    LENGTH_PLACE: gl.constexpr,
    TILE: gl.constexpr,
    WORDS: gl.constexpr,
    RAW: gl.constexpr,
    WALL_UNIT: gl.constexpr,
    ALIGNED: gl.constexpr,
    ROW_BYTES: gl.constexpr,
    COLUMNS: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    SIBLINGS: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    PDL: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    STAGED: gl.constexpr,
    SHARED_KB: gl.constexpr,
):
    """As `linear_kernel`, with a ring."""
    thread = gl.arange(0, 32 * NUM_WARPS, layout=gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    memory = gl.allocate_shared_memory(gl.int32, [SHARED_KB, 256], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    # a use of it, or the compiler would not declare its symbol
    memory.index(0).store(gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [NUM_WARPS], [0])))
    linear_block(
        thread,
        words_ptr,
        table_ptr,
        x_ptr,
        act_scale_ptr,
        bias_ptr,
        out_ptr,
        partial_ptr,
        counter_ptr,
        M,
        M_PAD,
        N,
        tiles,
        residual_ptr,
        stride_residual,
        words1_ptr,
        words2_ptr,
        words3_ptr,
        bias1_ptr,
        bias2_ptr,
        bias3_ptr,
        N1,
        N2,
        N3,
        LATTICE,
        K,
        SHIFT,
        GAIN,
        LENGTH_PLACE,
        TILE,
        WORDS,
        RAW,
        WALL_UNIT,
        ALIGNED,
        ROW_BYTES,
        COLUMNS,
        SPLIT,
        HAS_BIAS,
        HAS_RESIDUAL,
        SIBLINGS,
        NUM_WARPS,
        PDL,
        STEPS,
        STAGES,
        STAGED,
        "global_smem",
    )
