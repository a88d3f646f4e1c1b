"""Global memory, one element per thread, by inline PTX.

Why.  Triton's loads and stores take part in its coalescing pass, which is there to choose layouts. These kernels have one layout, and for
      each of them the pass walks the whole kernel: with 64 batch columns it took 38 of 39 seconds that the linear kernel took to compile,
      in attention with heads of 256 30 of 45 (2-core virtual x86-64, Triton 3.6, sm_90).

Elements have 16 or 32 bits. `mask` false: a load gives zero, a store does nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED
from .warp import pack_halves

if INTERPRETED:

    @triton.jit
    def load_global(pointer, mask=True):
        return tl.load(pointer, mask=(pointer.to(tl.int64) * mask) != 0, other=0)

    @triton.jit
    def store_global(pointer, value, mask):
        tl.store(pointer, value, mask=mask)

    @triton.jit
    def load_16(pointer):
        pointer = pointer.to(tl.pointer_type(tl.int32))
        return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)

    @triton.jit
    def load_16_float(pointer, mask):
        return load_global(pointer, mask), load_global(pointer + 1, mask), load_global(pointer + 2, mask), load_global(pointer + 3, mask)

    @triton.jit
    def store_16(pointer, a, b, c, d):
        tl.store(pointer, a)
        tl.store(pointer + 1, b)
        tl.store(pointer + 2, c)
        tl.store(pointer + 3, d)

    @triton.jit
    def load_four(pointer, mask):
        loaded = ()
        for i in tl.static_range(4):
            loaded = loaded + (load_global(pointer + i, mask).to(tl.float32),)
        return loaded

    @triton.jit
    def store_four(pointer, a, b, c, d, mask):
        dtype: tl.constexpr = pointer.dtype.element_ty
        store_global(pointer, a.to(dtype), mask)
        store_global(pointer + 1, b.to(dtype), mask)
        store_global(pointer + 2, c.to(dtype), mask)
        store_global(pointer + 3, d.to(dtype), mask)

else:

    @triton.jit
    def load_global(pointer, mask=True):
        """One element per thread."""
        dtype: tl.constexpr = pointer.dtype.element_ty
        place = pointer.to(tl.int64)
        loaded = place.to(tl.int32) * 0 + mask
        if dtype.primitive_bitwidth == 32:
            word = tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1];}",
                "=&r,l,r",
                [place, loaded],
                tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            word = tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b16 $0, 0; @p ld.global.b16 $0, [$1];}",
                "=&h,l,r",
                [place, loaded],
                tl.int16,
                is_pure=False,
                pack=1,
            )
        return word.to(dtype, bitcast=True)

    @triton.jit
    def store_global(pointer, value, mask):
        """One element per thread."""
        if pointer.dtype.element_ty.primitive_bitwidth == 32:
            tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, $2;}",
                "=r,l,r,r",
                [pointer.to(tl.int64), value.to(tl.int32, bitcast=True), mask.to(tl.int32)],
                tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b16 $0, $2;}",
                "=h,l,h,r",
                [pointer.to(tl.int64), value.to(tl.int16, bitcast=True), mask.to(tl.int32)],
                tl.int16,
                is_pure=False,
                pack=1,
            )

    @triton.jit
    def load_16(pointer):
        """Four int32 per thread from 16 aligned bytes."""
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointer.to(tl.int64)],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def load_16_float(pointer, mask):
        """Four fp32 per thread from 16 aligned bytes, not from the L1, which may hold what was there before."""
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.s32 p, $5, 0;
            mov.f32 $0, 0f00000000;
            mov.f32 $1, 0f00000000;
            mov.f32 $2, 0f00000000;
            mov.f32 $3, 0f00000000;
            @p ld.global.cg.v4.f32 {$0, $1, $2, $3}, [$4];
            }""",
            "=&f,=&f,=&f,=&f,l,r",
            [pointer.to(tl.int64), mask.to(tl.int32)],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def store_16(pointer, a, b, c, d):
        """Four fp32 per thread to 16 aligned bytes."""
        tl.inline_asm_elementwise(
            "st.global.v4.f32 [$1], {$2, $3, $4, $5}; mov.f32 $0, $2;",
            "=f,l,f,f,f,f",
            [pointer.to(tl.int64), a, b, c, d],
            tl.float32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def _half_of(word, i: tl.constexpr, DTYPE: tl.constexpr):
        """Half `i` of a word as fp32."""
        return (word >> (16 * i)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)

    @triton.jit
    def load_four(pointer, mask):
        """Four neighbouring elements as fp32, aligned to as many."""
        dtype: tl.constexpr = pointer.dtype.element_ty
        place = pointer.to(tl.int64)
        if dtype.primitive_bitwidth == 32:
            return tl.inline_asm_elementwise(
                """{
                .reg .pred p;
                setp.ne.s32 p, $5, 0;
                mov.f32 $0, 0f00000000;
                mov.f32 $1, 0f00000000;
                mov.f32 $2, 0f00000000;
                mov.f32 $3, 0f00000000;
                @p ld.global.v4.f32 {$0, $1, $2, $3}, [$4];
                }""",
                "=&f,=&f,=&f,=&f,l,r",
                [place, mask.to(tl.int32)],
                (tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=False,
                pack=1,
            )
        else:
            low, high = tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; @p ld.global.v2.b32 {$0, $1}, [$2];}",
                "=&r,=&r,l,r",
                [place, mask.to(tl.int32)],
                (tl.int32, tl.int32),
                is_pure=False,
                pack=1,
            )
            return _half_of(low, 0, dtype), _half_of(low, 1, dtype), _half_of(high, 0, dtype), _half_of(high, 1, dtype)

    @triton.jit
    def store_four(pointer, a, b, c, d, mask):
        """Four fp32, rounded, to neighbouring elements, aligned to as many."""
        dtype: tl.constexpr = pointer.dtype.element_ty
        place = pointer.to(tl.int64)
        if dtype.primitive_bitwidth == 32:
            tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.s32 p, $6, 0; @p st.global.v4.f32 [$1], {$2, $3, $4, $5}; mov.f32 $0, $2;}",
                "=f,l,f,f,f,f,r",
                [place, a, b, c, d, mask.to(tl.int32)],
                tl.float32,
                is_pure=False,
                pack=1,
            )
        else:
            tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.s32 p, $4, 0; @p st.global.v2.b32 [$1], {$2, $3}; mov.b32 $0, $2;}",
                "=r,l,r,r,r",
                [place, pack_halves(a, b, dtype), pack_halves(c, d, dtype), mask.to(tl.int32)],
                tl.int32,
                is_pure=False,
                pack=1,
            )
