"""Launches for the KV cache: attention that reads coded slots, and encoding of new tokens into theirs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton

from ..format.lattice import GRANULAR_ERROR
from ..format.layout import TileLayout
from ..format.on_device import on_device
from ..format.quantizer import MAX_OVERLOAD, PRICE, check_effort
from ..format.rates import start_rms
from ..format.rounding import class_bits
from . import ahead
from .kernels.attention import attention_kernel
from .kernels.kv_encode import encode_kernel
from .kernels.shared import SHARED_BYTES
from .kernels.slots import buffer_bytes
from .kernels.softmax import combine_kernel
from .launch import MMA_COLUMNS, dependent_launch, multiprocessors
from .paging import STEP_TOKENS, cache_shape

# bytes of shared memory for slots: what the tables leave of a kernel's static share
_BUFFERS_BYTES = 16384
# coordinates of a slot whose queries and sums fit in registers
MAX_PERIOD = 256
# queries beyond this many blocks of columns are better served by decoding once
MAX_COLUMN_BLOCKS = 4
# of a multiprocessor: programs that its shared memory has room for, and registers
_MOST_BLOCKS, _REGISTERS = 4, 65536
_MASKS = (torch.bool, torch.float16, torch.bfloat16, torch.float32)
# microseconds that a program takes per token and once (measured, H200, 4 bps, 2026-11-24), and a combining kernel adds; they only weigh
# programs that would wait for a second wave against programs that stay idle
_PER_TOKEN, _PER_PROGRAM, _COMBINE = 0.023, 3.0, 2.0
_MAX_SPLITS, _MAX_WAVES = 64, 16


@dataclass(frozen=True)
class AttentionLaunch:
    """How the attention kernel is launched.

    Args:
        num_warps: warps per program, each with 16 tokens at a time.
        splits: programs that may share the tokens of a head.
        registers: most registers per thread, or 0 for what the compiler likes.
    """

    num_warps: int
    splits: int
    registers: int = 0


def column_period(tile: int, head_dim: int) -> int:
    """Coordinates of a slot that the kernel keeps queries and sums of (its PERIOD): short slots have room for all."""
    return tile if tile <= MAX_PERIOD else math.lcm(head_dim, 32)


def _warps(k_layout: TileLayout, v_layout: TileLayout, head_dim: int) -> int:
    """Most warps per program whose buffers, and whose sums, fit in shared memory; 0 if none do."""
    per_warp, period = buffer_bytes(k_layout.words) + buffer_bytes(v_layout.words), column_period(k_layout.tile, head_dim)
    return next((n for n in (8, 4, 2, 1) if n * per_warp <= _BUFFERS_BYTES and n * (32 * period + 64) <= SHARED_BYTES.value), 0)


@functools.lru_cache(maxsize=1024)
def attention_launch(
    units: int, max_tokens: int, processors: int, k_layout: TileLayout, v_layout: TileLayout, head_dim: int | None = None
) -> AttentionLaunch:
    """Launch for `units` heads of slots (times blocks of columns) that fills the device's waves of programs best; heads fill a slot."""
    num_warps = _warps(k_layout, v_layout, head_dim or k_layout.tile)
    registers = 128 if k_layout.tile == 128 else 255
    wave = processors * min(_MOST_BLOCKS, _REGISTERS // (32 * num_warps * registers))
    # against the slots and the warps that were measured
    share = k_layout.tile / 128 * 8 / num_warps

    def microseconds(splits: int) -> float:
        rounds = -(-units * splits // wave)
        return rounds * (_PER_TOKEN * share * max_tokens / splits + _PER_PROGRAM) + (_COMBINE if splits > 1 else 0)

    # as many as have a round for each warp, and one for the exact tokens; and sums of parts that need little memory
    most = max(1, min(_MAX_SPLITS, -(-max_tokens // (16 * num_warps)) + 1, _MAX_WAVES * wave // units))
    return AttentionLaunch(num_warps, min(range(1, most + 1), key=microseconds), registers)


def unsupported(
    query: torch.Tensor,
    k_words: torch.Tensor,
    k_exact: torch.Tensor,
    mask: torch.Tensor | None,
    k_layout: TileLayout,
    v_layout: TileLayout,
    page_table: torch.Tensor | None = None,
) -> str | None:
    """Why `attend` cannot take these arguments, or None if it can."""
    head_dim, queries, kv_heads, page_size = query.shape[-1], query.shape[2], k_exact.shape[1], k_words.shape[2]
    max_tokens = cache_shape(k_words, page_table)[1]
    if k_layout.lattice != "e8" or v_layout.lattice != "e8":
        return f"lattice must be e8, got {k_layout.lattice} and {v_layout.lattice}"
    if k_layout.tile != v_layout.tile:
        return f"slots must have the same number of coefficients, got {k_layout.tile} and {v_layout.tile}"
    if head_dim % 8 or k_layout.tile % head_dim:
        return f"head_dim must be a multiple of 8 that divides the slot, got {head_dim}"
    if column_period(k_layout.tile, head_dim) > MAX_PERIOD:
        return f"head_dim must have a common multiple with 32 of at most {MAX_PERIOD} in slots of {k_layout.tile}, got {head_dim}"
    if _warps(k_layout, v_layout, head_dim) == 0:
        return f"slots are too long for shared memory, got {k_layout.words} and {v_layout.words} words"
    if max_tokens * k_layout.words % 4 or max_tokens * v_layout.words % 4 or max_tokens * max(k_layout.words, v_layout.words) >= 2**31:
        return f"max_tokens must be a multiple of 4 and a head of fewer than 2^31 words, got {max_tokens} tokens"
    if page_table is not None and (page_size < STEP_TOKENS or page_size & (page_size - 1)):
        return f"page_size must be a power of two of at least {STEP_TOKENS}, got {page_size}"
    if k_exact.dtype not in (torch.float16, torch.bfloat16) or query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"exact tokens must be fp16 or bf16 and queries that or fp32, got {k_exact.dtype} and {query.dtype}"
    if not (ahead.is_aligned(k_words) and ahead.is_aligned(k_exact)):
        return "tensors must start at multiples of 16 bytes"
    if -(-queries * (k_layout.tile // head_dim) * (query.shape[1] // kv_heads) // MMA_COLUMNS) > MAX_COLUMN_BLOCKS:
        return f"{queries} queries per head are too many"
    if mask is not None:
        last = sum((size - 1) * stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
        if mask.dtype not in _MASKS or mask.stride(-1) != 1 or mask.shape[-1] < max_tokens or last >= 2**31:
            return f"mask must be bool or up to 32 bits wide, contiguous in the last dimension, and as long as the cache, got {mask.dtype}"
    return None


def _two_tables(k_layout: TileLayout, v_layout: TileLayout, device: torch.device) -> torch.Tensor:
    """Decoding tables forwards of two codes, `[2, 4096]` int32, made once."""

    def make() -> torch.Tensor:
        return torch.stack([layout.quotient_code.table(layout.kernel_shift, layout.kernel_length_place) for layout in (k_layout, v_layout)])

    return on_device(("two tables", k_layout.code, v_layout.code), make, device)


def attend(
    query: torch.Tensor,
    k_words: torch.Tensor,
    v_words: torch.Tensor,
    k_exact: torch.Tensor,
    v_exact: torch.Tensor,
    length: torch.Tensor,
    start: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    sinks: int,
    window: int,
    sliding_window: int,
    k_layout: TileLayout,
    v_layout: TileLayout,
    launch: AttentionLaunch | None = None,
    page_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the newest tokens over a cache, decoded on the way into the tensor cores.

    Args:
        query: `[B, Hq, S, D]` in the basis of the keys, fp16, bf16 or fp32.
        k_words, v_words: `[B, kv_heads / join, max_tokens, words]` int32, contiguous; join = tile / D, rounded up heads.
        k_exact, v_exact: `[B, kv_heads, sinks + window, D]` fp16 or bf16, contiguous: position p < sinks at p, else at
            `sinks + (p - sinks) % window`.
        length: `[1]` or `[B]` int64, tokens stored; query s stands at position `length - S + s`.
        start: `[B]` int64, first position seen, or None.
        mask: `[B or 1, 1 or Hq, S, >= max_tokens]`, last dimension contiguous, or None; bool, true where seen, or fp16, bf16 or fp32 and
            added to the scores, where -1e30 or less hides.
        scale: of scores.
        sliding_window: positions that a query sees, its own included; 0: all.
        k_layout, v_layout: of the slots; see `unsupported`.
        page_table: int32 `[B, max_pages]`; then words are pools `[num_pages, kv_heads / join, page_size, words]`, and max_tokens is
            `max_pages * page_size`. Slots of pages outside of `[0, num_pages)` are not seen.

    Returns:
        `[B, Hq, S, D]` in the basis of the values, dtype of `query`; zeros where nothing is seen.

    Raises:
        ValueError: `unsupported` gives a reason.

    Note: no host sync, and a launch that does not depend on `length`.
    """
    v_exact = v_exact.to(k_exact.dtype)
    reason = unsupported(query, k_words, k_exact, mask, k_layout, v_layout, page_table) or unsupported(
        query, v_words, v_exact, mask, k_layout, v_layout, page_table
    )
    if reason is not None:
        raise ValueError(reason)
    batch, query_heads, queries, head_dim = query.shape
    heads, max_tokens = k_words.shape[1], cache_shape(k_words, page_table)[1]
    kv_heads, join = k_exact.shape[1], k_layout.tile // head_dim
    paged = page_table is not None
    # log2 of the steps in a page
    page_shift = (k_words.shape[2] // STEP_TOKENS).bit_length() - 1 if paged else 0
    group = query_heads // kv_heads
    # rows are read 16 bytes at a time
    if query.stride(-1) != 1 or not ahead.is_aligned(query) or any(s * query.element_size() % 16 for s in query.stride()[:3]):
        query = query.contiguous()
    device = query.device
    column_blocks = -(-queries * join * group // MMA_COLUMNS)
    units = batch * heads
    if launch is None:
        launch = attention_launch(
            units * column_blocks, max_tokens, multiprocessors(device) if query.is_cuda else 1, k_layout, v_layout, head_dim
        )
    splits, tile, period, two_codes = launch.splits, k_layout.tile, column_period(k_layout.tile, head_dim), k_layout.code != v_layout.code
    out = torch.empty((batch, query_heads, queries, head_dim), dtype=query.dtype, device=device)
    if out.numel() == 0:
        return out
    split = splits > 1
    partial = torch.empty((units, column_blocks, splits, MMA_COLUMNS, period), dtype=torch.float32, device=device) if split else out
    state = torch.empty((units, column_blocks, splits, MMA_COLUMNS, 2), dtype=torch.float32, device=device) if split else out
    # stands in for shared memory where there is none
    scratch = k_words if query.is_cuda else torch.empty(12288, dtype=torch.int32)
    pdl = dependent_launch(device)
    options = {"launch_pdl": True} if pdl else {}
    mask_strides = (0, 0, 0)
    if mask is not None:
        mask_strides = (*(mask.stride(i) if mask.shape[i] > 1 else 0 for i in (0, 1)), mask.stride(2))
        mask = mask.view(torch.int8) if mask.dtype == torch.bool else mask
    ahead.launch(
        attention_kernel,
        (units, splits, column_blocks),
        query,
        k_words,
        v_words,
        _two_tables(k_layout, v_layout, device) if two_codes else k_layout.kernel_tables(device),
        k_exact,
        v_exact,
        length.contiguous(),
        length if start is None else start.contiguous(),
        length if mask is None else mask,
        out,
        partial,
        state,
        scratch,
        page_table.contiguous() if paged else length,
        scale * math.log2(math.e),
        queries,
        group,
        heads,
        kv_heads,
        max_tokens,
        sinks,
        window,
        sliding_window,
        *query.stride()[:3],
        *mask_strides,
        k_words.shape[0],
        page_table.shape[1] if paged else 0,
        page_shift,
        TILE=tile,
        K_RICE=k_layout.rice_parameter,
        K_SHIFT=k_layout.kernel_shift,
        K_GAIN=k_layout.kernel_shift - k_layout.shift,
        K_PLACE=k_layout.kernel_length_place,
        K_WORDS=k_layout.words,
        V_RICE=v_layout.rice_parameter,
        V_SHIFT=v_layout.kernel_shift,
        V_GAIN=v_layout.kernel_shift - v_layout.shift,
        V_PLACE=v_layout.kernel_length_place,
        V_WORDS=v_layout.words,
        TWO_CODES=two_codes,
        WALL_UNIT=k_layout.wall_unit,
        HEAD_DIM=head_dim,
        JOIN=join,
        PERIOD=period,
        HAS_START=start is not None,
        HAS_MASK=mask is not None,
        OWN_LENGTHS=length.shape[0] > 1,
        PAGED=paged,
        SPLIT=split,
        NUM_WARPS=launch.num_warps,
        PDL=pdl,
        num_warps=launch.num_warps,
        num_stages=1,
        **({"maxnreg": launch.registers} if launch.registers else {}),
        **options,
    )
    if split:
        ahead.launch(
            combine_kernel,
            (units, queries * join * group),
            partial,
            state,
            out,
            queries,
            group,
            heads,
            kv_heads,
            splits,
            column_blocks,
            PERIOD=period,
            WIDTH=triton.next_power_of_2(period),
            HEAD_DIM=head_dim,
            JOIN=join,
            STEP=min(triton.next_power_of_2(splits), 64),
            PDL=pdl,
            num_warps=4,
            **options,
        )
    return out


def _symbol_bits(layout: TileLayout, device: torch.device) -> torch.Tensor:
    """Ideal bits of each symbol from the least to the largest in range, fp32, made once."""
    of_class, top = class_bits(layout), layout.max_magnitude
    bits = tuple(of_class[max(s, -s - 1) >> (layout.rice_parameter - 1)] for s in range(-top - 1, top + 1))
    return on_device(("symbol bits", bits), lambda: torch.tensor(bits, dtype=torch.float32), device)


@dataclass(frozen=True)
class EncodeLaunch:
    """How the encoder is launched, one program per slot.

    Args:
        candidates: scales, or lambdas, that are tried at a time; a power of two.
        finer: of the first ones, how many are finer than the average tile's.
        num_warps: warps per program; at most one thread for each candidate's vectors is of use.
    """

    candidates: int
    finer: int
    num_warps: int


# few slots wait for their rounds, so one window should do: of Gaussians from 1.75 to 6 bps, head_dim 96 to 256, the finest scale that
# fits is (measured) 16 finer to 14 coarser than the average for effort 1, and 10 finer to 27 coarser for effort 0, which needs more bits;
# many slots fill the device, where what counts is how much is tried: most need less, and the rest another round
FEW, MANY = {0: EncodeLaunch(32, 8, 8), 1: EncodeLaunch(32, 15, 8)}, {0: EncodeLaunch(16, 6, 4), 1: EncodeLaunch(16, 8, 4)}
_MANY_SLOTS = 2048


def store(
    words: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    layout: TileLayout,
    effort: int = 1,
    launch: EncodeLaunch | None = None,
    page_table: torch.Tensor | None = None,
    other: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Encode tokens into their slots, in place.

    Args:
        words: `[B, kv_heads / join, max_tokens, words]` int32, contiguous; join = tile / D, rounded down; heads rounded up.
        x: `[B, kv_heads, S, D]`, rotated, fp16, bf16 or fp32; NaN and infinities count as zeros.
        position: `[S]` or `[B, S]` int64, contiguous, slots of the tokens; others than `[0, max_tokens)` are not written.
        layout: of the slots, e8.
        effort: 0 rounds to the nearest point, 1 by error and bits (`hq_inductor.format.quantizer`).
        page_table: int32 `[B, max_pages]`; then words are a pool `[num_pages, kv_heads / join, page_size, words]`. Slots of pages outside
            of `[0, num_pages)` are not written.
        other: words and x of the same shapes, dtypes and layout, which are encoded in the same launch; or None.

    Raises:
        ValueError: another lattice or effort, a head_dim that is no multiple of 8 or no slot's, or `other` is of another kind.

    Note: no host sync.
    """
    check_effort(effort)
    if layout.lattice != "e8" or effort > 1:
        raise ValueError(f"lattice must be e8 and effort 0 or 1, got {layout.lattice!r} and {effort}")
    batch, all_heads, tokens, head_dim = x.shape
    heads, word_count = words.shape[1], words.shape[3]
    rows, max_tokens = cache_shape(words, page_table)
    join = layout.tile // head_dim
    if head_dim % 8 or join == 0 or heads != -(-all_heads // join) or rows != batch or word_count != layout.words:
        raise ValueError(f"slots {tuple(words.shape)} of {layout.tile} coefficients cannot hold tokens {tuple(x.shape)}")
    words2, x2 = (words, x) if other is None else other
    if (words2.shape, x2.shape, x2.dtype) != (words.shape, x.shape, x.dtype):
        raise ValueError(
            f"other must be like words {tuple(words.shape)} and x {tuple(x.shape)}, {x.dtype}, got {tuple(x2.shape)}, {x2.dtype}"
        )
    x, x2 = (states if states.stride(-1) == 1 else states.contiguous() for states in (x, x2))
    if x.numel() == 0:
        return
    sides = 1 if other is None else 2
    if launch is None:
        launch = (FEW if sides * batch * heads * tokens < _MANY_SLOTS else MANY)[effort]
    device = x.device
    pdl = dependent_launch(device)
    ahead.launch(
        encode_kernel,
        (batch * heads, tokens, sides),
        x,
        position,
        words,
        x2,
        words2,
        layout.lengths(device),
        layout.codewords(device),
        _symbol_bits(layout, device),
        position if page_table is None else page_table.contiguous(),
        heads,
        all_heads,
        max_tokens,
        *x.stride()[:3],
        *x2.stride()[:3],
        tokens if position.dim() == 2 else 0,
        words.shape[0],
        0 if page_table is None else page_table.shape[1],
        words.shape[2],
        PRICE * GRANULAR_ERROR["e8"] if effort else 0.0,
        start_rms(layout.code / 8, "e8"),
        MAX_OVERLOAD * GRANULAR_ERROR["e8"] * layout.tile,
        K=layout.rice_parameter,
        CLASSES=layout.classes,
        LIMIT=layout.max_magnitude + 1,
        TILE=layout.tile,
        WORDS=layout.words,
        WALL_UNIT=layout.wall_unit,
        HEAD_DIM=head_dim,
        JOIN=join,
        VECTORS=triton.next_power_of_2(layout.tile // 8),
        STREAM_PAD=triton.next_power_of_2(layout.stream_words),
        EFFORT=effort,
        CANDIDATES=launch.candidates,
        FINER=launch.finer,
        PAIR=sides == 2,
        PAGED=page_table is not None,
        PDL=pdl,
        num_warps=launch.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )
