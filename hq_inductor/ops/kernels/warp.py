"""What the threads of a warp do together: products on the tensor cores, transposition and exchange of registers.

One element per thread, as `hq_inductor.ops.kernels.bits`; thread `4 r + j` of a warp is lane j of row r. The operands of the products are
the fragments of `mma.sync` in PTX: registers of the first factor hold rows r and r + 8, those of the second column r, sums stand in rows
r and r + 8, columns 2 j and 2 j + 1. Under Triton's interpreter plain Triton of the same meaning stands in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED

if INTERPRETED:

    @triton.jit
    def _byte(x, i: tl.constexpr):
        return (x << (24 - 8 * i)) >> 24

    @triton.jit
    def _to_float(x, i: tl.constexpr, DTYPE: tl.constexpr):
        """Half `i` of a register as fp32."""
        return ((x << (16 - 16 * i)) >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)

    @triton.jit
    def mma_s8(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, NUM_WARPS: tl.constexpr):
        shape: tl.constexpr = [NUM_WARPS, 8, 1, 4]
        upper = tl.zeros([NUM_WARPS, 8, 8], tl.int32)
        lower = tl.zeros([NUM_WARPS, 8, 8], tl.int32)
        for i in tl.static_range(4):
            x0 = tl.reshape(_byte(b0, i), [NUM_WARPS, 1, 8, 4])
            x1 = tl.reshape(_byte(b1, i), [NUM_WARPS, 1, 8, 4])
            upper += tl.sum(tl.reshape(_byte(a0, i), shape) * x0 + tl.reshape(_byte(a2, i), shape) * x1, 3)
            lower += tl.sum(tl.reshape(_byte(a1, i), shape) * x0 + tl.reshape(_byte(a3, i), shape) * x1, 3)
        d0, d1 = tl.split(tl.reshape(upper, [32 * NUM_WARPS, 2]))
        d2, d3 = tl.split(tl.reshape(lower, [32 * NUM_WARPS, 2]))
        return c0 + d0, c1 + d1, c2 + d2, c3 + d3

    @triton.jit
    def mma_16bit(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, DTYPE: tl.constexpr, NUM_WARPS: tl.constexpr):
        shape: tl.constexpr = [NUM_WARPS, 8, 1, 4]
        upper = tl.zeros([NUM_WARPS, 8, 8], tl.float32)
        lower = tl.zeros([NUM_WARPS, 8, 8], tl.float32)
        for i in tl.static_range(2):
            x0 = tl.reshape(_to_float(b0, i, DTYPE), [NUM_WARPS, 1, 8, 4])
            x1 = tl.reshape(_to_float(b1, i, DTYPE), [NUM_WARPS, 1, 8, 4])
            upper += tl.sum(tl.reshape(_to_float(a0, i, DTYPE), shape) * x0 + tl.reshape(_to_float(a2, i, DTYPE), shape) * x1, 3)
            lower += tl.sum(tl.reshape(_to_float(a1, i, DTYPE), shape) * x0 + tl.reshape(_to_float(a3, i, DTYPE), shape) * x1, 3)
        d0, d1 = tl.split(tl.reshape(upper, [32 * NUM_WARPS, 2]))
        d2, d3 = tl.split(tl.reshape(lower, [32 * NUM_WARPS, 2]))
        return c0 + d0, c1 + d1, c2 + d2, c3 + d3

    @triton.jit
    def largest_of_quad(x):
        quads = tl.reshape(x, [x.shape[0] // 4, 4])
        return tl.reshape(tl.broadcast_to(tl.max(quads, 1)[:, None], quads.shape), x.shape)

    @triton.jit
    def _e4m3_bits(value):
        """fp32 as e4m3, ties to even, saturated; the interpreter's own conversion rounds otherwise (Triton 3.9)."""
        size = tl.minimum(tl.abs(value), 448.0)
        unit = tl.exp2(tl.maximum(tl.floor(tl.log2(tl.maximum(size, 2.0**-9))), -6.0) - 3.0)
        size = ((size / unit + 12582912.0) - 12582912.0) * unit
        exponent = tl.maximum(tl.floor(tl.log2(tl.maximum(size, 2.0**-9))), -6.0)
        # subnormals have no leading bit
        bits = (size * tl.exp2(3.0 - exponent)).to(tl.int32) + (exponent.to(tl.int32) + 6) * 8
        return bits | tl.where(value < 0, 128, 0)

    @triton.jit
    def codes_to_e4m3(codes, scales, offsets, BIASED: tl.constexpr, EXACT: tl.constexpr):
        if BIASED:
            codes = codes ^ -0x7F7F7F80
        word = codes * 0
        for i in tl.static_range(4):
            value = (_byte(codes, i).to(tl.float32) * _to_float(scales, i % 2, tl.float16)).to(tl.float16).to(tl.float32)
            word = word | (_e4m3_bits(value) << (8 * i))
        return word

    @triton.jit
    def transpose(x, NUM_WARPS: tl.constexpr):
        matrix = tl.reshape(tl.join((x << 16) >> 16, x >> 16), [NUM_WARPS, 8, 8])
        low, high = tl.split(tl.reshape(tl.permute(matrix, [0, 2, 1]), [32 * NUM_WARPS, 2]))
        return (low & 0xFFFF) | (high << 16)

    @triton.jit
    def exchange(x, DISTANCE: tl.constexpr, NUM_WARPS: tl.constexpr):
        a, b = tl.split(tl.permute(tl.reshape(x, [16 * NUM_WARPS // DISTANCE, 2, DISTANCE]), [0, 2, 1]))
        return tl.reshape(tl.permute(tl.join(b, a), [0, 2, 1]), [32 * NUM_WARPS])

    @triton.jit
    def from_lane(x, lane, NUM_WARPS: tl.constexpr):
        return tl.gather(x, tl.arange(0, 32 * NUM_WARPS) // 32 * 32 + lane, 0)

    @triton.jit
    def pack_halves(low, high, DTYPE: tl.constexpr):
        low = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        high = high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        return (low & 0xFFFF) | (high << 16)

    @triton.jit
    def pack_bytes(a, b, c, d):
        return (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24)

    @triton.jit
    def biased_to_half(x, i: tl.constexpr):
        low = ((x >> (8 * i)) & 0xFF) - 128
        high = ((x >> (16 + 8 * i)) & 0xFF) - 128
        return pack_halves(low.to(tl.float32), high.to(tl.float32), tl.float16)

    @triton.jit
    def halves(a, b, i: tl.constexpr):
        return ((a >> (16 * i)) & 0xFFFF) | ((b >> (16 * i)) << 16)

    @triton.jit
    def sync_warp(thread):
        pass

    @triton.jit
    def own_warp(x, thread):
        return thread // 32

    @triton.jit
    def rounds_of(count):
        return tl.max(count, 0)

else:

    @triton.jit
    def mma_s8(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, NUM_WARPS: tl.constexpr):
        """`c + a b`: int8 `[16, 32]` by `[32, 8]`, sums in int32."""
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def mma_16bit(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, DTYPE: tl.constexpr, NUM_WARPS: tl.constexpr):
        """`c + a b`: fp16 or bf16 `[16, 16]` by `[16, 8]`, sums in fp32."""
        if DTYPE == tl.float16:
            return tl.inline_asm_elementwise(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
                "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
                [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
                (tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
                "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
                [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
                (tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )

    @triton.jit
    def largest_of_quad(x):
        """Largest of four neighbouring threads' int32."""
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 other;
            shfl.sync.bfly.b32 other, $1, 1, 31, 0xffffffff;
            max.s32 $0, $1, other;
            shfl.sync.bfly.b32 other, $0, 2, 31, 0xffffffff;
            max.s32 $0, $0, other;
            }""",
            "=&r,r",
            [x],
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.constexpr_function
    def _e4m3_asm(biased, exact):
        def product(x):
            if exact:
                return f"fma.rn.f16x2 {x}, {x}, $2, $3;"
            return f"sub.rn.f16x2 {x}, {x}, offset; mul.rn.f16x2 {x}, {x}, $2;"

        return f"""{{
            .reg .b32 biased, low, high, offset; .reg .b16 p, q;
            mov.b32 offset, 0x64646464;
            {"mov.b32 biased, $1;" if biased else "xor.b32 biased, $1, 0x80808080;"}
            prmt.b32 low, biased, offset, 0x4140;
            prmt.b32 high, biased, offset, 0x4342;
            mov.b32 offset, 0x64806480;
            {product("low")}
            {product("high")}
            cvt.rn.satfinite.e4m3x2.f16x2 p, low;
            cvt.rn.satfinite.e4m3x2.f16x2 q, high;
            mov.b32 $0, {{p, q}};
            }}"""

    @triton.jit
    def codes_to_e4m3(codes, scales, offsets, BIASED: tl.constexpr, EXACT: tl.constexpr):
        """Four int8, or BIASED uint8 that are 128 more, by fp16 `scales`, of even and of odd places; rounded to fp16, then to e4m3.

        EXACT: `offsets`, -1152 times as much, are exact in fp16.
        """
        # a code under 0x64 is a half 1024 + 128 more than it; the converting instructions are slower
        return tl.inline_asm_elementwise(_e4m3_asm(BIASED, EXACT), "=r,r,r,r", [codes, scales, offsets], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def transpose(x, NUM_WARPS: tl.constexpr):
        """Transpose 8 x 8 matrices of 16 bits; before and after, thread `4 r + j` holds columns 2 j and 2 j + 1 of row r."""
        return tl.inline_asm_elementwise("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def exchange(x, DISTANCE: tl.constexpr, NUM_WARPS: tl.constexpr):
        """fp32 of the thread whose number differs in the bit DISTANCE."""
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;",
            "=f,f,r",
            [x, tl.full(x.shape, DISTANCE, tl.int32)],
            tl.float32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def from_lane(x, lane, NUM_WARPS: tl.constexpr):
        """fp32 of thread `lane` of the warp."""
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [x, lane], tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def pack_halves(low, high, DTYPE: tl.constexpr):
        """Two fp32 rounded to fp16 or bf16 in one register."""
        if DTYPE == tl.float16:
            return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1)
        else:
            return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def pack_bytes(a, b, c, d):
        """The lowest bytes of four registers, that of `a` lowest."""
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, u; prmt.b32 t, $1, $2, 0x0040; prmt.b32 u, $3, $4, 0x0040; prmt.b32 $0, t, u, 0x5410;}",
            "=r,r,r,r,r",
            [a, b, c, d],
            tl.int32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def biased_to_half(x, i: tl.constexpr):
        """Bytes i and i + 2, less 128, as two fp16."""
        if i == 0:
            # the byte under 0x64 is 1024 more in fp16
            return tl.inline_asm_elementwise(
                "{.reg .b32 t; prmt.b32 t, $1, 0x64646464, 0x4240; add.f16x2 $0, t, $2;}",
                "=r,r,r",
                [x, tl.full(x.shape, -0x1B7F1B80, tl.int32)],  # 0xE480 twice: -1152
                tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "{.reg .b32 t; prmt.b32 t, $1, 0x64646464, 0x4341; add.f16x2 $0, t, $2;}",
                "=r,r,r",
                [x, tl.full(x.shape, -0x1B7F1B80, tl.int32)],
                tl.int32,
                is_pure=True,
                pack=1,
            )

    @triton.jit
    def halves(a, b, i: tl.constexpr):
        """Halves i of both, that of `a` below."""
        if i == 0:
            return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
        else:
            return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def own_warp(x, thread):
        """Number of the warp in its block, as a scalar: what follows from it may differ from warp to warp, branches and loops too.

        `x` is any int32 scalar.
        """
        return tl.inline_asm_elementwise("{.reg .b32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 5;}", "=r,r", [x], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def rounds_of(count):
        """Rounds of a loop of so many of each warp; under the interpreter as many for all, the last warp's."""
        return count

    @triton.jit
    def sync_warp(thread):
        """Wait until all threads of the warp are here, and see what they wrote to shared memory."""
        tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.u32 $0, $1;", "=r,r", [thread], tl.int32, is_pure=False, pack=1)


@triton.jit
def column_max(x, NUM_WARPS: tl.constexpr):
    """Largest of the threads that share j."""
    x = tl.maximum(x, exchange(x, 4, NUM_WARPS))
    x = tl.maximum(x, exchange(x, 8, NUM_WARPS))
    return tl.maximum(x, exchange(x, 16, NUM_WARPS))


@triton.jit
def column_sum(x, NUM_WARPS: tl.constexpr):
    """Sum over the threads that share j."""
    x = x + exchange(x, 4, NUM_WARPS)
    x = x + exchange(x, 8, NUM_WARPS)
    return x + exchange(x, 16, NUM_WARPS)
