"""Shared memory of one thread block, by inline PTX: the decoding table, and two buffers per warp for stream planes on their way in.

Triton allocates shared memory only for its own conversions, and has no gather from it. Layout, in bytes:

    0 .. 16 KiB                     the decoding table, `[4096]` int32
    16 KiB + 32 (ROW_BYTES + 16) w  warp w: two buffers of 16 rows, ROW_BYTES (64 or 128) and 16 apart, which spreads rows over the banks
    after that                      what else a kernel wants (`hq_inductor.ops.kernels.warpgroup`); at least OVERRUN

A decoder that corrupt words lead astray reads up to OVERRUN bytes before or after a row: other rows, the table, or what comes after; never
outside. 48 KiB are the most that a kernel may declare statically;
`hq_inductor.ops.kernels.linear_ring` has Gluon allocate more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED

TABLE_BYTES = tl.constexpr(16384)
SHARED_BYTES = tl.constexpr(49152)
# between rows: the least that leaves them aligned to what is copied at a time
ROW_GAP = tl.constexpr(16)
# a tile has at most 48 vectors per lane, of at most 31 bits each; three words from there on
OVERRUN = 48 * 31 // 8 + 12


def buffer_bytes(row_bytes: int) -> int:
    """Bytes of a warp's two buffers."""
    return 32 * (row_bytes + ROW_GAP.value) if row_bytes else 0


def row_bytes(stream_words: int) -> int:
    """Bytes of a row's stream plane in a buffer, or 0 where it is too long for one."""
    return 64 if stream_words <= 16 else 128 if stream_words <= 32 else 0


@triton.jit
def scratch_address(scratch_ptr, thread):
    """Address of a tensor that stands in for shared memory under the interpreter, int64 of the shape of `thread`."""
    return scratch_ptr.to(tl.int64) + thread.to(tl.int64) * 0


@triton.jit
def declare_shared(thread):
    """Declare the block's shared memory, once per kernel; returns its address, int32 of the shape of `thread`."""
    return tl.inline_asm_elementwise(
        ".shared .align 128 .b8 hq_shared[49152]; mov.u32 $0, hq_shared;", "=r,r", [thread], tl.int32, is_pure=False, pack=1
    )


@triton.constexpr_function
def _base_asm(symbol):
    return f"mov.u32 $0, {symbol};"


@triton.jit
def shared_base(x, SYMBOL: tl.constexpr):
    """Address of the block's shared memory, int32 of the shape of `x`, the same in all threads."""
    return tl.inline_asm_elementwise(_base_asm(SYMBOL), "=r,r", [x], tl.int32, is_pure=True, pack=1)


if INTERPRETED:
    # an address is one of global memory: `scratch_address` of a tensor that stands in

    @triton.jit
    def load_shared(address):
        return tl.load(address.to(tl.pointer_type(tl.int32)))

    @triton.jit
    def load_shared_16(address):
        return load_shared(address), load_shared(address + 4), load_shared(address + 8), load_shared(address + 12)

    @triton.jit
    def load_shared_floats(address):
        pointer = address.to(tl.pointer_type(tl.float32))
        return tl.load(pointer), tl.load(pointer + 1)

    @triton.jit
    def load_shared_float(address, mask):
        return tl.load(address.to(tl.pointer_type(tl.float32)), mask=mask, other=0)

    @triton.jit
    def store_shared_16(address, a, b, c, d):
        pointer = address.to(tl.pointer_type(tl.float32))
        tl.store(pointer, a)
        tl.store(pointer + 1, b)
        tl.store(pointer + 2, c)
        tl.store(pointer + 3, d)

    @triton.jit
    def store_shared(address, value):
        tl.store(address.to(tl.pointer_type(tl.int32)), value)

    @triton.jit
    def copy_async(address, pointer, BYTES: tl.constexpr):
        for i in tl.static_range(BYTES // 4):
            store_shared(address + 4 * i, tl.load(pointer + i))

    @triton.jit
    def commit_copies(thread):
        pass

    @triton.jit
    def wait_copies(thread):
        pass

    @triton.jit
    def wait_older_copies(thread):
        pass

else:

    @triton.jit
    def load_shared(address):
        """One int32 word per thread."""
        return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [address], tl.int32, is_pure=False, pack=1)

    @triton.jit
    def load_shared_16(address):
        """Four int32 words per thread from 16 aligned bytes."""
        return tl.inline_asm_elementwise(
            "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r",
            [address],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def load_shared_floats(address):
        """Two fp32 per thread from 8 aligned bytes."""
        return tl.inline_asm_elementwise(
            "ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [address], (tl.float32, tl.float32), is_pure=False, pack=1
        )

    @triton.jit
    def load_shared_float(address, mask):
        """One fp32 per thread, or 0."""
        return tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.f32 $0, 0f00000000; @p ld.shared.f32 $0, [$1];}",
            "=&f,r,r",
            [address, mask.to(tl.int32)],
            tl.float32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def store_shared_16(address, a, b, c, d):
        """Four fp32 per thread to 16 aligned bytes."""
        tl.inline_asm_elementwise(
            "st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.f32 $0, $2;",
            "=f,r,f,f,f,f",
            [address, a, b, c, d],
            tl.float32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def store_shared(address, value):
        """One int32 word per thread."""
        tl.inline_asm_elementwise("st.shared.b32 [$1], $2; mov.u32 $0, $1;", "=r,r,r", [address, value], tl.int32, is_pure=False, pack=1)

    @triton.constexpr_function
    def _copy_asm(size):
        # only pieces of 16 bytes can pass the L1 by
        return f"cp.async.{'cg' if size == 16 else 'ca'}.shared.global [$1], [$2], {size}; mov.u32 $0, $1;"

    @triton.jit
    def copy_async(address, pointer, BYTES: tl.constexpr):
        """Start to copy 4, 8 or 16 bytes, aligned to as many, from global `pointer` to shared `address`."""
        tl.inline_asm_elementwise(_copy_asm(BYTES), "=r,r,l", [address, pointer.to(tl.int64)], tl.int32, is_pure=False, pack=1)

    @triton.jit
    def commit_copies(thread):
        """Close a batch of copies."""
        tl.inline_asm_elementwise("cp.async.commit_group; mov.u32 $0, $1;", "=r,r", [thread], tl.int32, is_pure=False, pack=1)

    @triton.jit
    def wait_copies(thread):
        """Wait for all copies of the calling warp."""
        tl.inline_asm_elementwise(
            "cp.async.wait_group 0; bar.warp.sync 0xffffffff; mov.u32 $0, $1;", "=r,r", [thread], tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def wait_older_copies(thread):
        """Wait for all copies of the calling warp but its last batch."""
        tl.inline_asm_elementwise(
            "cp.async.wait_group 1; bar.warp.sync 0xffffffff; mov.u32 $0, $1;", "=r,r", [thread], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _load_words(pointer, address, thread, COUNT: tl.constexpr, NUM_WARPS: tl.constexpr):
    for step in tl.static_range(0, COUNT // (4 * 32 * NUM_WARPS)):
        index = (step * 32 * NUM_WARPS + thread) * 4
        copy_async(address + index * 4, pointer + index, 16)


@triton.jit
def load_table(table_ptr, address, thread, NUM_WARPS: tl.constexpr):
    """Start copying the decoding table to shared memory."""
    _load_words(table_ptr, address, thread, 4096, NUM_WARPS)


@triton.jit
def load_tables(table_ptr, address, thread, NUM_WARPS: tl.constexpr):
    """Start copying the tables of both directions to shared memory."""
    _load_words(table_ptr, address, thread, 8192, NUM_WARPS)
