"""All the shared memory that a block can have, for kernels that are plain Triton otherwise.

Triton itself allocates shared memory only for its own conversions, and 48 KiB are the most that inline PTX may declare. Gluon allocates as
much as there is. Under the interpreter, which knows neither, there is none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .bits import INTERPRETED

# its symbol in PTX
BLOCK_MEMORY = tl.constexpr("global_smem")

if INTERPRETED:
    whole_memory_jit = triton.jit

    @triton.jit
    def open_block(NUM_WARPS: tl.constexpr, PARTS: tl.constexpr, SHARED_KB: tl.constexpr):
        return tl.arange(0, 32 * NUM_WARPS)

else:
    whole_memory_jit = gluon.jit

    @triton.constexpr_function
    def _cluster_layouts(warps, parts):
        """Of one element per thread of a cluster; of memory of each of its blocks."""
        blocks = [[1 << i] for i in range(parts.bit_length() - 1)]
        threads = gl.BlockedLayout([1], [32], [warps], [0], cga_layout=blocks)
        return threads, gl.SwizzledSharedLayout(1, 1, 1, order=[0], cga_layout=blocks)

    @gluon.jit
    def open_block(NUM_WARPS: tl.constexpr, PARTS: tl.constexpr, SHARED_KB: tl.constexpr):
        """Numbers of the block's threads, one per thread; PARTS blocks are a cluster, each has SHARED_KB KiB at BLOCK_MEMORY."""
        LAYOUTS: gl.constexpr = _cluster_layouts(NUM_WARPS, PARTS)
        memory = gl.allocate_shared_memory(gl.int32, [SHARED_KB, 256 * PARTS], LAYOUTS[1])
        # a use of it, or the compiler would not declare its symbol
        memory.index(0).store(gl.arange(0, 256 * PARTS, layout=LAYOUTS[0]))
        tl.debug_barrier()
        return gl.arange(0, 32 * NUM_WARPS * PARTS, layout=LAYOUTS[0]) % (32 * NUM_WARPS)
