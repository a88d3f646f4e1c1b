"""What four warps do together on sm_90: products with a factor from shared memory, which bulk copies bring there.

One element per thread, as `hq_inductor.ops.kernels.bits`; scalars are the same in all threads. Thread `4 r + j` of warp w of the group
holds of the first factor the fragment of `mma.m16n8k32` for rows 16 w to 16 w + 15, in registers, and of the sums rows r and r + 8, columns
8 b + 2 j and 8 b + 2 j + 1 of block b, four registers per block.

Ring.     The second factor comes in chunks through `STAGES` slots of shared memory. Each slot has two barriers: `full`, on which the copy
          counts its bytes, and `empty`, on which every warp counts itself when it is done with the slot. One thread refills. Parities of
          a slot's barriers are those of the round, `chunk / STAGES`.
Slot.     A chunk of 32 S coefficients of COLUMNS rows: `[2 S][COLUMNS][16]` bytes, no swizzle: 8 rows of 16 bytes are what the tensor
          core reads at a time, 128 bytes side by side.
Triton's interpreter knows none of this: there the second factor is read where the copies would read it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import INTERPRETED
from .ring_output import output_bytes
from .shared import TABLE_BYTES, buffer_bytes
from .warp import mma_s8

_BARRIER_BYTES = tl.constexpr(128)


# shared memory that the blocks of a multiprocessor can have together, in KiB
_MULTIPROCESSOR_KB = 226


def ring_shape(
    columns: int, num_warps: int, blocks: int, words: int, row_bytes: int, stageable: bool, fp8: bool, sharing: int = 1
) -> tuple[int, int, bool, int]:
    """Ring for `columns` rows of the second factor: steps of 32 coefficients per chunk, chunks, whether whole tiles are staged,
    and the shared memory of a block in KiB.

    Args:
        blocks: of a multiprocessor.
        words: of a tile, of which warps hold two of 16 rows, if they are `stageable` and there is room; else only stream planes, in rows of
            `row_bytes`.
        fp8: no scales of columns come through shared memory.
        sharing: rings of a block, of which each has so many chunks.

    Raises:
        ValueError: there is no room for three chunks.
    """
    for staged in (True, False) if stageable else (False,):
        warp = 2 * 16 * (4 * words + 16) + (0 if fp8 else 8 * columns) if staged else buffer_bytes(row_bytes)
        fixed = TABLE_BYTES.value + num_warps * warp + _BARRIER_BYTES.value * sharing
        # few barriers, but three chunks at least
        for steps in (4, 2, 1):
            stages = (_MULTIPROCESSOR_KB // blocks * 1024 - fixed) // (32 * steps * columns * sharing)
            if stages >= 3:
                stages = min(stages, 4)
                taken = fixed + stages * 32 * steps * columns * sharing
                # sums go out through all of it but the table
                taken = max(taken, TABLE_BYTES.value + sharing * output_bytes(columns, 16 * num_warps // sharing))
                return steps, stages, staged, -(-taken // 1024)
    raise ValueError(f"columns must be fewer for {blocks} blocks of {num_warps} warps and tiles of {words} words, got {columns}")


if INTERPRETED:

    @triton.jit
    def _e4m3_byte(x, i: tl.constexpr):
        return (x >> (8 * i)).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float32)

    @triton.jit
    def _mma_e4m3(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, NUM_WARPS: tl.constexpr):
        """As `mma_s8`, of e4m3."""
        shape: tl.constexpr = [NUM_WARPS, 8, 1, 4]
        upper = tl.zeros([NUM_WARPS, 8, 8], tl.float32)
        lower = tl.zeros([NUM_WARPS, 8, 8], tl.float32)
        for i in tl.static_range(4):
            x0 = tl.reshape(_e4m3_byte(b0, i), [NUM_WARPS, 1, 8, 4])
            x1 = tl.reshape(_e4m3_byte(b1, i), [NUM_WARPS, 1, 8, 4])
            upper += tl.sum(tl.reshape(_e4m3_byte(a0, i), shape) * x0 + tl.reshape(_e4m3_byte(a2, i), shape) * x1, 3)
            lower += tl.sum(tl.reshape(_e4m3_byte(a1, i), shape) * x0 + tl.reshape(_e4m3_byte(a3, i), shape) * x1, 3)
        d0, d1 = tl.split(tl.reshape(upper, [32 * NUM_WARPS, 2]))
        d2, d3 = tl.split(tl.reshape(lower, [32 * NUM_WARPS, 2]))
        return c0 + d0, c1 + d1, c2 + d2, c3 + d3

    @triton.jit
    def open_ring(address, thread, STAGES: tl.constexpr, NUM_WARPS: tl.constexpr):
        pass

    @triton.jit
    def refill(thread, full, parity, slot, source, DISTANCE: tl.constexpr, BYTES: tl.constexpr):
        pass

    @triton.jit
    def fill(thread, full, slot, source, BYTES: tl.constexpr):
        pass

    @triton.jit
    def wait_full(full, parity):
        pass

    @triton.jit
    def release(full, lane, DISTANCE: tl.constexpr):
        pass

    @triton.jit
    def products_issue(sums, a0, a1, a2, a3, slot, x_ptr, lane, COLUMNS: tl.constexpr, FP8: tl.constexpr, NUM_WARPS: tl.constexpr):
        column_ptr = x_ptr + (lane // 4) * 16 + lane % 4 * 4
        updated = ()
        for b in tl.static_range(COLUMNS // 8):
            b0 = tl.load((column_ptr + 128 * b).to(tl.pointer_type(tl.int32)))
            b1 = tl.load((column_ptr + 128 * b + 16 * COLUMNS).to(tl.pointer_type(tl.int32)))
            s0, s1, s2, s3 = sums[4 * b], sums[4 * b + 1], sums[4 * b + 2], sums[4 * b + 3]
            if FP8:
                updated = updated + _mma_e4m3(s0, s1, s2, s3, a0, a1, a2, a3, b0, b1, NUM_WARPS)
            else:
                updated = updated + mma_s8(s0, s1, s2, s3, a0, a1, a2, a3, b0, b1, NUM_WARPS)
        return updated

    @triton.jit
    def products_wait(sums, COLUMNS: tl.constexpr, FP8: tl.constexpr):
        return sums

    @triton.jit
    def fill_pieces(thread, full, slot, first_a, second_a, b, A_BYTES: tl.constexpr, B_BYTES: tl.constexpr):
        pass

    @triton.jit
    def refill_pieces(
        thread, full, parity, slot, first_a, second_a, b, DISTANCE: tl.constexpr, A_BYTES: tl.constexpr, B_BYTES: tl.constexpr
    ):
        pass

    @triton.jit
    def multiply_chunk(
        sums,
        full,
        parity,
        slot,
        warp,
        first_a,
        second_a,
        b,
        lane,
        FIRST: tl.constexpr,
        LAST: tl.constexpr,
        COLUMNS: tl.constexpr,
        NUM_WARPS: tl.constexpr,
    ):
        a_ptr = tl.where(warp < 4, first_a.to(tl.int64), second_a.to(tl.int64)).to(tl.pointer_type(tl.int32))
        # words: a block of 16 coefficients has 256, a row four
        a_ptr = a_ptr + (warp % 4) * 64 + (lane // 4) * 4 + lane % 4
        for step in tl.static_range(4):
            a0, a1 = tl.load(a_ptr + 512 * step), tl.load(a_ptr + 512 * step + 32)
            a2, a3 = tl.load(a_ptr + 512 * step + 256), tl.load(a_ptr + 512 * step + 288)
            sums = products_issue(sums, a0, a1, a2, a3, slot, b + 32 * COLUMNS * step, lane, COLUMNS, False, NUM_WARPS)
        return sums

else:

    @triton.constexpr_function
    def _issue_asm(columns, fp8):
        n = columns // 2
        sums = ", ".join(f"${i}" for i in range(n))
        a0, a1, a2, a3, low = (f"${n + i}" for i in range(5))
        kind, last = ("f32.e4m3.e4m3", "1, 1, 1") if fp8 else ("s32.s8.s8", "1")
        return (
            f"{{.reg .b64 b; mov.b64 b, {{{low}, 8}}; wgmma.fence.sync.aligned; "
            f"wgmma.mma_async.sync.aligned.m64n{columns}k32.{kind} {{{sums}}}, {{{a0}, {a1}, {a2}, {a3}}}, b, {last}; "
            "wgmma.commit_group.sync.aligned;}"
        )

    @triton.constexpr_function
    def _issue_constraints(columns, fp8):
        n = columns // 2
        return ",".join(["=f" if fp8 else "=r"] * n + ["r"] * 5 + [str(i) for i in range(n)])

    @triton.constexpr_function
    def _wait_constraints(columns, fp8):
        n = columns // 2
        return ",".join(["=f" if fp8 else "=r"] * n + [str(i) for i in range(n)])

    @triton.constexpr_function
    def _words(columns, fp8):
        return (tl.float32 if fp8 else tl.int32,) * (columns // 2)

    @triton.jit
    def open_ring(address, thread, STAGES: tl.constexpr, NUM_WARPS: tl.constexpr):
        """Barriers at `address`: all `full`, then all `empty`. A barrier of the block must follow."""
        for stage in tl.static_range(STAGES):
            tl.inline_asm_elementwise(
                """{
                .reg .pred first;
                setp.eq.s32 first, $2, 0;
                @first mbarrier.init.shared::cta.b64 [$1], 1;
                @first mbarrier.init.shared::cta.b64 [$3], $4;
                @first fence.mbarrier_init.release.cluster;
                @first fence.proxy.async.shared::cta;
                mov.u32 $0, $1;
                }""",
                "=r,r,r,r,r",
                [address + 8 * stage, thread, address + 8 * (STAGES + stage), NUM_WARPS],
                tl.int32,
                is_pure=False,
                pack=1,
            )

    @triton.jit
    def fill(thread, full, slot, source, BYTES: tl.constexpr):
        """Thread 0 starts to copy a chunk to `slot`."""
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.eq.s32 p, $1, 0;
            @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], $5;
            @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$3], [$4], $5, [$2];
            mov.u32 $0, $1;
            }""",
            "=r,r,r,r,l,r",
            [thread, full, slot, source.to(tl.int64), BYTES],
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.constexpr_function
    def _refill_asm(distance, size):
        return f"""{{
            .reg .pred p, done;
            setp.eq.s32 p, $1, 0;
            @!p bra REFILLED;
            WAIT:
            mbarrier.try_wait.parity.shared::cta.b64 done, [$2+{distance}], $3;
            @!done bra WAIT;
            mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], {size};
            cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$4], [$5], {size}, [$2];
            REFILLED:
            bar.warp.sync 0xffffffff;
            mov.u32 $0, $1;
            }}"""

    @triton.jit
    def refill(thread, full, parity, slot, source, DISTANCE: tl.constexpr, BYTES: tl.constexpr):
        """As `fill`, when all warps are done with what the slot held."""
        tl.inline_asm_elementwise(
            _refill_asm(DISTANCE, BYTES),
            "=r,r,r,r,r,l",
            [thread, full, parity, slot, source.to(tl.int64)],
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.constexpr_function
    def _copies_asm(a_bytes, b_bytes, wait):
        """Thread 0 starts to copy three pieces, `wait`: when all warps have counted themselves, so many bytes after the first barrier."""
        copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        waiting = f"WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [$2+{wait}], $7; @!done bra WAIT;" if wait else ""
        return f"""{{
            .reg .pred p, done; .reg .b32 to;
            setp.eq.s32 p, $1, 0;
            @!p bra COPIED;
            {waiting}
            mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], {2 * a_bytes + b_bytes};
            {copy} [$3], [$4], {a_bytes}, [$2];
            add.u32 to, $3, {a_bytes};
            {copy} [to], [$5], {a_bytes}, [$2];
            add.u32 to, $3, {2 * a_bytes};
            {copy} [to], [$6], {b_bytes}, [$2];
            COPIED:
            bar.warp.sync 0xffffffff;
            mov.u32 $0, $1;
            }}"""

    @triton.jit
    def fill_pieces(thread, full, slot, first_a, second_a, b, A_BYTES: tl.constexpr, B_BYTES: tl.constexpr):
        """Thread 0 starts to copy two pieces of A_BYTES and one of B_BYTES to `slot`, one after the other."""
        tl.inline_asm_elementwise(
            _copies_asm(A_BYTES, B_BYTES, 0),
            "=r,r,r,r,l,l,l",
            [thread, full, slot, first_a.to(tl.int64), second_a.to(tl.int64), b.to(tl.int64)],
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def refill_pieces(
        thread, full, parity, slot, first_a, second_a, b, DISTANCE: tl.constexpr, A_BYTES: tl.constexpr, B_BYTES: tl.constexpr
    ):
        """As `fill_pieces`, when all warps are done with what the slot held."""
        tl.inline_asm_elementwise(
            _copies_asm(A_BYTES, B_BYTES, DISTANCE),
            "=r,r,r,r,l,l,l,r",
            [thread, full, slot, first_a.to(tl.int64), second_a.to(tl.int64), b.to(tl.int64), parity],
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.constexpr_function
    def _chunk_asm(columns, first, last):
        n = columns // 2
        sums = ", ".join(f"${i}" for i in range(n))
        full, parity, a, b = (f"${n + i}" for i in range(4))
        steps = "".join(
            f"add.u32 t, {a}, {128 * step}; mov.b64 a, {{t, 8}}; add.u32 t, {b}, {2 * columns * step}; mov.b64 b, {{t, 8}};"
            f"wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8 {{{sums}}}, a, b, {int(step > 0 or not first)};"
            for step in range(4)
        )
        return (
            "{.reg .pred done; .reg .b32 t; .reg .b64 a, b;"
            f"WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [{full}], {parity}; @!done bra WAIT;"
            f"wgmma.fence.sync.aligned; {steps} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned {int(not last)};}}"
        )

    @triton.constexpr_function
    def _chunk_constraints(columns, first):
        n = columns // 2
        # what the first step leaves is not read before
        return ",".join(["=&r" if first else "=r"] * n + ["r"] * 4 + ([] if first else [str(i) for i in range(n)]))

    @triton.jit
    def multiply_chunk(
        sums,
        full,
        parity,
        slot,
        warp,
        first_a,
        second_a,
        b,
        lane,
        FIRST: tl.constexpr,
        LAST: tl.constexpr,
        COLUMNS: tl.constexpr,
        NUM_WARPS: tl.constexpr,
    ):
        """`sums + a b` of a chunk of 128 coefficients once it is at `slot`: 64 rows of a for each group of four warps, then COLUMNS of b,
        as blocks of 16 coefficients.

        FIRST: `sums` are zeros. The chunk before is done then; if LAST so is this one, else nothing of the sums may be touched.
        """
        a_low = (((slot + (warp // 4) * 8192) & 0x3FFFF) >> 4) + (64 << 16)
        b_low = (((slot + 16384) & 0x3FFFF) >> 4) + (COLUMNS << 16)
        return tl.inline_asm_elementwise(
            _chunk_asm(COLUMNS, FIRST, LAST),
            _chunk_constraints(COLUMNS, FIRST),
            (full + lane * 0, parity + lane * 0, a_low, b_low + lane * 0) + (() if FIRST else sums),
            _words(COLUMNS, False),
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def wait_full(full, parity):
        tl.inline_asm_elementwise(
            """{
            .reg .pred done;
            WAIT:
            mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;
            @!done bra WAIT;
            mov.u32 $0, $1;
            }""",
            "=r,r,r",
            [full, parity],
            tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.constexpr_function
    def _release_asm(distance):
        return f"{{.reg .pred first; setp.eq.s32 first, $2, 0; @first mbarrier.arrive.shared::cta.b64 _, [$1+{distance}]; mov.u32 $0, $1;}}"

    @triton.jit
    def release(full, lane, DISTANCE: tl.constexpr):
        """The calling warp is done with a slot."""
        tl.inline_asm_elementwise(_release_asm(DISTANCE), "=r,r,r", [full, lane], tl.int32, is_pure=False, pack=1)

    @triton.jit
    def products_issue(sums, a0, a1, a2, a3, slot, x_ptr, lane, COLUMNS: tl.constexpr, FP8: tl.constexpr, NUM_WARPS: tl.constexpr):
        """Start `sums + a b`, b at `slot` in shared memory. Nothing of it may be touched before `products_wait`."""
        # in a cluster addresses have the block's number above these bits
        low = ((slot & 0x3FFFF) >> 4) + (COLUMNS << 16)
        return tl.inline_asm_elementwise(
            _issue_asm(COLUMNS, FP8),
            _issue_constraints(COLUMNS, FP8),
            (a0, a1, a2, a3, low) + sums,
            _words(COLUMNS, FP8),
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def products_wait(sums, COLUMNS: tl.constexpr, FP8: tl.constexpr):
        """The sums of all products under way."""
        return tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0;",
            _wait_constraints(COLUMNS, FP8),
            sums,
            _words(COLUMNS, FP8),
            is_pure=False,
            pack=1,
        )


@triton.jit
def next_products(
    sums,
    a0,
    a1,
    a2,
    a3,
    place,
    source,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    FP8: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Start the products of step STEP of a chunk; those before are done then.

    `place`: number, slot and parity of the chunk, then slots and parities of the two before. `source`: the first chunk in global memory,
    its slot, the first barrier, number of chunks, thread and lane.
    """
    CHUNK: tl.constexpr = 32 * STEPS * COLUMNS
    chunk, slot, parity, slot_1, parity_1, slot_2, parity_2 = place
    x_ptr, slots, barriers, chunks, thread, lane = source
    sums = products_wait(sums, COLUMNS, FP8)
    if STEP == 0:
        # this warp is done with the chunk before; with the one before that all are, or soon, and a new one takes its slot
        release(barriers + 8 * slot_1, lane + tl.where(chunk >= 1, 0, 32), 8 * STAGES)
        new = chunk + (STAGES - 2)
        refill(
            thread + tl.where((chunk >= 2) & (new < chunks), 0, 256),
            barriers + 8 * slot_2,
            parity_2,
            slots + CHUNK * slot_2,
            x_ptr + CHUNK * new,
            8 * STAGES,
            CHUNK,
        )
        wait_full(barriers + 8 * slot, parity)
    offset: tl.constexpr = 32 * COLUMNS * STEP
    sums = products_issue(
        sums, a0, a1, a2, a3, slots + (CHUNK * slot + offset), x_ptr + (CHUNK * chunk + offset), lane, COLUMNS, FP8, NUM_WARPS
    )
    if STEP == STEPS - 1:
        wraps = slot == STAGES - 1
        return sums, (chunk + 1, tl.where(wraps, 0, slot + 1), tl.where(wraps, parity ^ 1, parity), slot, parity, slot_1, parity_1)
    else:
        return sums, place
