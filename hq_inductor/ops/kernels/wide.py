"""Global memory 16 bytes per thread at a time, by inline PTX; one load_16 is one instruction where `tl.load` makes four."""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED

if INTERPRETED:

    @triton.jit
    def load_16(pointer, mask):
        pointer = pointer.to(tl.pointer_type(tl.int32))
        w0 = tl.load(pointer, mask=mask, other=0)
        w1 = tl.load(pointer + 1, mask=mask, other=0)
        w2 = tl.load(pointer + 2, mask=mask, other=0)
        w3 = tl.load(pointer + 3, mask=mask, other=0)
        return w0, w1, w2, w3

else:

    @triton.jit
    def load_16(pointer, mask):
        """Four int32 from `pointer` (16-byte aligned), zeros where the mask is false."""
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.s32 p, $5, 0;
            mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
            @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
            }""",
            "=&r,=&r,=&r,=&r,l,r",
            [pointer.to(tl.int64), mask.to(tl.int32)],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_8_values(pointer, mask):
    """Eight neighbouring fp16, bf16 or fp32 from a pointer (16-byte aligned) as fp32, zeros where the mask is false."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    values = ()
    if dtype == tl.float32:
        for half in tl.static_range(2):
            words = load_16(pointer + 4 * half, mask)
            for i in tl.static_range(4):
                values = values + (words[i].to(tl.float32, bitcast=True),)
    else:
        words = load_16(pointer, mask)
        for i in tl.static_range(4):
            if dtype == tl.bfloat16:
                values = values + ((words[i] << 16).to(tl.float32, bitcast=True), (words[i] & -65536).to(tl.float32, bitcast=True))
            else:
                values = values + (
                    words[i].to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
                    (words[i] >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
                )
    return values
