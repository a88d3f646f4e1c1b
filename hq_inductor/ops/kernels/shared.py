"""Shared memory of one thread block, by inline PTX: the decoding table, and two buffers per warp for stream planes on their way in.

Triton allocates shared memory only for its own conversions, and has no gather from it. Layout, in bytes:

    0 .. 16 KiB           the decoding table, `[4096]` int32
    16 KiB + 4 KiB w      warp w: two buffers of 16 rows x 32 words; word i of row r at `128 r + ((4 i) ^ (16 (r % 8)))`

Addresses are `base | offset` with the offset masked, so that no bits read from a tile can lead out of a buffer. The 48 KiB of 8 warps are the
most that a kernel may declare statically.
"""

from __future__ import annotations

import triton
import triton.language as tl

TABLE_BYTES = tl.constexpr(16384)
WARP_BYTES = tl.constexpr(4096)
BUFFER_BYTES = tl.constexpr(2048)
MAX_WARPS = 8
MAX_STAGED_WORDS = 32


@triton.jit
def declare_shared(thread, NUM_WARPS: tl.constexpr):
    """Declare the block's shared memory, once per kernel; returns its address, int32 of the shape of `thread`."""
    if NUM_WARPS == 8:
        return tl.inline_asm_elementwise(
            ".shared .align 128 .b8 hq_shared[49152]; mov.u32 $0, hq_shared;", "=r,r", [thread], tl.int32, is_pure=False, pack=1
        )
    elif NUM_WARPS == 4:
        return tl.inline_asm_elementwise(
            ".shared .align 128 .b8 hq_shared[32768]; mov.u32 $0, hq_shared;", "=r,r", [thread], tl.int32, is_pure=False, pack=1
        )
    else:
        tl.static_assert(NUM_WARPS <= 2)
        return tl.inline_asm_elementwise(
            ".shared .align 128 .b8 hq_shared[24576]; mov.u32 $0, hq_shared;", "=r,r", [thread], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def load_shared(address):
    """One int32 word per thread."""
    return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [address], tl.int32, is_pure=False, pack=1)


@triton.jit
def copy_async_16(address, pointer):
    """Start to copy 16 bytes from global `pointer` (16-byte aligned) to shared `address`."""
    tl.inline_asm_elementwise(
        "cp.async.cg.shared.global [$1], [$2], 16; mov.u32 $0, $1;",
        "=r,r,l",
        [address, pointer.to(tl.int64)],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def copy_async_4(address, pointer):
    """Start to copy 4 bytes from global `pointer` to shared `address`."""
    tl.inline_asm_elementwise(
        "cp.async.ca.shared.global [$1], [$2], 4; mov.u32 $0, $1;",
        "=r,r,l",
        [address, pointer.to(tl.int64)],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def commit_copies(thread):
    """Close a batch of copies."""
    tl.inline_asm_elementwise("cp.async.commit_group; mov.u32 $0, $1;", "=r,r", [thread], tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_copies(thread, PENDING: tl.constexpr):
    """Wait until at most `PENDING` (0 or 1) batches of the calling thread are under way, then for the warp."""
    if PENDING == 0:
        tl.inline_asm_elementwise(
            "cp.async.wait_group 0; bar.warp.sync 0xffffffff; mov.u32 $0, $1;", "=r,r", [thread], tl.int32, is_pure=False, pack=1
        )
    else:
        tl.inline_asm_elementwise(
            "cp.async.wait_group 1; bar.warp.sync 0xffffffff; mov.u32 $0, $1;", "=r,r", [thread], tl.int32, is_pure=False, pack=1
        )
