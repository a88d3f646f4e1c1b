"""Device bit operations, one element per thread.

The kernels that decode are written thread by thread: every tensor has one element per thread, so that a register is where the tensor cores
want it and no layout conversion is left. What Triton has no word for is inline PTX, one instruction each. Under Triton's interpreter
(`TRITON_INTERPRET=1`), which knows no PTX, plain Triton of the same meaning stands in; both are tested against each other through the
kernels."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def shift_right(x, amount):
    """Logical shift of int32."""
    return (x.to(tl.uint32, bitcast=True) >> amount).to(tl.int32, bitcast=True)


@triton.jit
def rotate_left(x, amount):
    """By `amount & 31`."""
    return funnel_left(x, x, amount)


if INTERPRETED:

    @triton.jit
    def funnel_left(high, low, amount):
        """Upper word of `(high:low) << (amount & 31)`."""
        wide = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        return (wide >> (32 - (amount & 31)).to(tl.int64)).to(tl.int32)

    @triton.jit
    def spread_signs(x):
        """Each byte to 0xFF if its highest bit is set, else 0."""
        return (shift_right(x, 7) & 0x01010101) * 255

    @triton.jit
    def spread_sign(x):
        """All ones if bit 31 is set, else 0."""
        return x >> 31

    @triton.jit
    def and_xor(a, mask, b):
        """`(a & mask) ^ b`."""
        return (a & mask) ^ b

    @triton.jit
    def reverse_bits(x):
        """Bit 0 becomes bit 31."""
        x = (shift_right(x, 1) & 0x55555555) | ((x & 0x55555555) << 1)
        x = (shift_right(x, 2) & 0x33333333) | ((x & 0x33333333) << 2)
        x = (shift_right(x, 4) & 0x0F0F0F0F) | ((x & 0x0F0F0F0F) << 4)
        x = (shift_right(x, 8) & 0x00FF00FF) | ((x & 0x00FF00FF) << 8)
        return shift_right(x, 16) | (x << 16)

    @triton.jit
    def parity(x):
        """Exclusive or of all bits."""
        x = x ^ shift_right(x, 16)
        x = x ^ shift_right(x, 8)
        x = x ^ shift_right(x, 4)
        x = x ^ shift_right(x, 2)
        return (x ^ shift_right(x, 1)) & 1

else:

    @triton.jit
    def funnel_left(high, low, amount):
        return tl.inline_asm_elementwise("shf.l.wrap.b32 $0, $2, $1, $3;", "=r,r,r,r", [high, low, amount], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def spread_signs(x):
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0xba98;", "=r,r", [x], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def spread_sign(x):
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0xbbbb;", "=r,r", [x], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def and_xor(a, mask, b):
        # spelled out, or LLVM regroups a chain of these into more instructions
        return tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0x6a;", "=r,r,r,r", [a, mask, b], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def reverse_bits(x):
        return tl.inline_asm_elementwise("brev.b32 $0, $1;", "=r,r", [x], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def parity(x):
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], tl.int32, is_pure=True, pack=1) & 1
