"""Loads and stores of global memory, one element per thread.

What Triton would emit for `tl.load` and `tl.store` of such tensors, without its search for a layout in which neighbours are loaded
together: there is nothing to find, and in a large kernel the search walks through all of it once per load and store (`TritonGPUCoalesce`).
Measured, 2-core virtual x86-64, Triton 3.6, sm_90: of the 3.8 s that the linear kernel took to compile for 8 columns the search was 1.2, of
13.4 for 32 columns 9.9, of 45 for attention with heads of 256 30; now at most 0.1, and in attention 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED

if INTERPRETED:

    @triton.jit
    def load_where(pointer, mask):
        return tl.load(pointer, mask=mask, other=0.0)

    @triton.jit
    def load_uncached(pointer, mask):
        return tl.load(pointer, mask=mask, other=0.0)

    @triton.jit
    def load_word(pointer):
        return tl.load(pointer)

    @triton.jit
    def load_pair(pointer):
        return tl.load(pointer), tl.load(pointer + 1)

    @triton.jit
    def store_where(pointer, value, mask):
        tl.store(pointer, value, mask=mask)

else:

    @triton.jit
    def load_where(pointer, mask):
        """An element of 16 or 32 bits, 0 where masked out."""
        DTYPE: tl.constexpr = pointer.dtype.element_ty
        if DTYPE.primitive_bitwidth == 16:
            return tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b16 $0, 0; @p ld.global.b16 $0, [$1];}",
                "=&h,l,r",
                [pointer.to(tl.int64), mask.to(tl.int32)],
                tl.int16,
                is_pure=False,
                pack=1,
            ).to(DTYPE, bitcast=True)
        else:
            return tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1];}",
                "=&r,l,r",
                [pointer.to(tl.int64), mask.to(tl.int32)],
                tl.int32,
                is_pure=False,
                pack=1,
            ).to(DTYPE, bitcast=True)

    @triton.jit
    def load_uncached(pointer, mask):
        """fp32 from the L2, 0 where masked out: the L1 may hold what was there before."""
        return tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.cg.b32 $0, [$1];}",
            "=&r,l,r",
            [pointer.to(tl.int64), mask.to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        ).to(tl.float32, bitcast=True)

    @triton.jit
    def load_word(pointer):
        """An element of 32 bits."""
        return tl.inline_asm_elementwise("ld.global.b32 $0, [$1];", "=r,l", [pointer.to(tl.int64)], tl.int32, is_pure=False, pack=1).to(
            pointer.dtype.element_ty, bitcast=True
        )

    @triton.jit
    def load_pair(pointer):
        """Two neighbouring fp32, the first at a multiple of 8 bytes."""
        return tl.inline_asm_elementwise(
            "ld.global.v2.f32 {$0, $1}, [$2];", "=f,=f,l", [pointer.to(tl.int64)], (tl.float32, tl.float32), is_pure=False, pack=1
        )

    @triton.jit
    def store_where(pointer, value, mask):
        """An element of 16 or 32 bits where the mask is set."""
        if value.dtype.primitive_bitwidth == 16:
            tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, $3;}",
                "=r,l,h,r",
                [pointer.to(tl.int64), value.to(tl.int16, bitcast=True), mask.to(tl.int32)],
                tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, $3;}",
                "=r,l,r,r",
                [pointer.to(tl.int64), value.to(tl.int32, bitcast=True), mask.to(tl.int32)],
                tl.int32,
                is_pure=False,
                pack=1,
            )
