"""Products of 4-bit floats with a scale per block (nvfp4, mxfp4), by the instructions for them, from sm_100 up.

Definition.  `out[m, n] = bias[n] + factor_x * factor_w * sum_k a[m, k] * w[n, k]`, a and w e2m1 times the scale of their block, sums in
             fp32.
Storage.     Two e2m1 in a byte, the one with the even index in the low half (`hq_inductor.format.mma.pack_e2m1`).
Work.        A block computes BLOCK_M x BLOCK_N outputs. Triton brings operands and scales to where the tensor cores want them; elsewhere it
             emulates mxfp4 with bf16, which tests make use of, and does not compile nvfp4. With blocks of 64 rows nvfp4 is emulated, too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED

if INTERPRETED:
    # which has no such product

    @triton.jit
    def _half(codes):
        """Values of e2m1 codes in the low four bits."""
        magnitude = codes & 7
        value = tl.where(magnitude < 4, magnitude * 0.5, tl.where(magnitude < 6, magnitude - 2.0, (magnitude - 4.0) * 2.0))
        return tl.where((codes & 8) != 0, -value, value)

    @triton.jit
    def _scaled(codes, scale, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
        """Real values of a piece's even and odd columns."""
        codes = codes.to(tl.int32)
        if GROUP == 32:
            value = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        else:
            value = scale.to(tl.float32)
        value = tl.reshape(tl.broadcast_to(value[:, :, None], [ROWS, BLOCK_K // GROUP, GROUP // 2]), [ROWS, BLOCK_K // 2])
        return _half(codes) * value, _half(codes >> 4) * value

    @triton.jit
    def _multiply(acc, a, a_scale, b, b_scale, GROUP: tl.constexpr):
        a_even, a_odd = _scaled(a, a_scale, a.shape[0], 2 * a.shape[1], GROUP)
        b_even, b_odd = _scaled(b, b_scale, b.shape[0], 2 * b.shape[1], GROUP)
        return acc + tl.dot(a_even, tl.trans(b_even)) + tl.dot(a_odd, tl.trans(b_odd))

else:

    @triton.jit
    def _multiply(acc, a, a_scale, b, b_scale, GROUP: tl.constexpr):
        return tl.dot_scaled(a, a_scale, "e2m1", tl.trans(b), b_scale, "e2m1", acc)


@triton.jit(do_not_specialize=["M", "N", "pieces"])
def block_scaled_matmul_kernel(
    x_ptr,  # [M, K / 2] uint8
    x_scale_ptr,  # [M, K / GROUP], uint8 exponents for GROUP 32, e4m3 for 16
    weight_ptr,  # [N, K / 2] uint8
    weight_scale_ptr,  # [N, K / GROUP], as x_scale
    factor_x_ptr,  # [] fp32, or anything if not FACTORS
    factor_w_ptr,
    bias_ptr,  # [N], or anything if not HAS_BIAS
    out_ptr,  # [M, N]
    M,
    N,
    pieces,  # K / BLOCK_K
    GROUP: tl.constexpr,
    FACTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Programs in order of their numbers: GROUP_M blocks of rows side by side, so that they share weights in the L2."""
    blocks_m = (M + BLOCK_M - 1) // BLOCK_M
    blocks_n = (N + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP_M * blocks_n)
    width = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    place = tl.program_id(0) - group * (GROUP_M * blocks_n)
    m = (group * GROUP_M + place % width) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (place // width) * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows that are not there: the last one again
    row_m = tl.minimum(m, M - 1).to(tl.int64)[:, None]
    row_n = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_K // 2)[None, :]
    block = tl.arange(0, BLOCK_K // GROUP)[None, :]
    a_ptr = x_ptr + row_m * (pieces * (BLOCK_K // 2)) + column
    b_ptr = weight_ptr + row_n * (pieces * (BLOCK_K // 2)) + column
    a_scale_ptr = x_scale_ptr + row_m * (pieces * (BLOCK_K // GROUP)) + block
    b_scale_ptr = weight_scale_ptr + row_n * (pieces * (BLOCK_K // GROUP)) + block
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(pieces):
        a = tl.load(a_ptr + i * (BLOCK_K // 2))
        b = tl.load(b_ptr + i * (BLOCK_K // 2))
        a_scale = tl.load(a_scale_ptr + i * (BLOCK_K // GROUP))
        b_scale = tl.load(b_scale_ptr + i * (BLOCK_K // GROUP))
        sums = _multiply(sums, a, a_scale, b, b_scale, GROUP)
    if FACTORS:
        # one after the other: their product may be too small
        sums = sums * tl.load(factor_w_ptr) * tl.load(factor_x_ptr)
    inside = (m < M)[:, None] & (n < N)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=inside)
