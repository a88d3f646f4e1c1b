"""Launches: words and activations to outputs, words to weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..format.layout import TileLayout
from . import ahead
from .fused_rotation import rotate_quantize, rotated_shape
from .kernels.decode import decode_kernel
from .kernels.linear import linear_kernel, most_strips
from .kernels.linear_ring import ring_linear_kernel
from .kernels.matmul import int8_matmul_kernel
from .kernels.ring_matmul import MATMUL_COLUMNS, MATMUL_KB, MATMUL_STAGES, MATMUL_WARPS, ring_matmul_kernel
from .kernels.shared import row_bytes
from .kernels.warpgroup import ring_shape
from .launch import (
    WARP_ROWS,
    LinearLaunch,
    MatmulLaunch,
    RingLaunch,
    deal_blocks,
    decode_launch_blocks,
    decode_warps,
    dependent_launch,
    fp8_launch,
    linear_launch,
    matmul_launch,
    multiprocessors,
    ring_products,
    ring_warps,
    warpgroup_products,
)
from .launch_table import stored_launch
from .prologue import NO_PROLOGUE, Prologue


def int8_matmul(
    x: torch.Tensor,
    act_scale: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    launch: MatmulLaunch | None = None,
) -> torch.Tensor:
    """`[M, N]` in `dtype` from `rotate` and `decode`.

    Args:
        x: `[M, K]` int8, with scales `act_scale`, `[tiles, M]` fp32.
        codes: `[N, K]` int8, with scales `scale`, `[N, tiles]` fp32.
        bias: `[N]` or None.
    """
    (batch, columns), (rows, tiles) = x.shape, scale.shape
    launch = launch or matmul_launch(batch, rows, tiles, multiprocessors(x.device), warpgroup_products(x.device))
    split = launch.splits > 1
    shape = (launch.splits, batch, rows) if split else (batch, rows)
    out = torch.empty(shape, dtype=torch.float32 if split else dtype, device=x.device)
    if out.numel() == 0:
        return out.sum(0).to(dtype) if split else out
    ahead.launch(
        int8_matmul_kernel,
        (-(-batch // launch.block_m) * -(-rows // launch.block_n), launch.splits),
        x,
        act_scale,
        codes,
        scale,
        out if bias is None else bias.contiguous(),
        out,
        batch,
        rows,
        tiles,
        TILE=columns // tiles,
        HAS_BIAS=bias is not None and not split,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        GROUP_M=8,
        num_warps=launch.num_warps,
        num_stages=launch.stages,
    )
    if split:
        out = out.sum(0)
        return (out if bias is None else out + bias).to(dtype)
    return out


def blocked_matmul(
    x: torch.Tensor,
    act_scale: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    batch: int,
    rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`[batch, rows]` in `dtype` on sm_90, from `rotate_quantize` with a ring of `MATMUL_COLUMNS` and `decode_blocks`.

    Args:
        x: `[padded batch / MATMUL_COLUMNS, K / 16, MATMUL_COLUMNS, 16]` int8, with scales `act_scale`, `[tiles, padded batch]` fp32.
        codes: `[padded rows / 64, K / 16, 64, 16]` int8, with scales `scale`, `[tiles, padded rows]` fp32.
        bias: `[rows]` or None.
    """
    out = torch.empty((batch, rows), dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    tiles, padded = act_scale.shape
    pdl = dependent_launch(codes.device)
    ahead.launch(
        ring_matmul_kernel,
        (-(-rows // 128) * (padded // MATMUL_COLUMNS),),
        codes,
        scale,
        x,
        act_scale,
        out if bias is None else bias.contiguous(),
        out,
        batch,
        padded,
        rows,
        scale.shape[1],
        tiles,
        TILE=16 * codes.shape[1] // tiles,
        COLUMNS=MATMUL_COLUMNS,
        STAGES=MATMUL_STAGES,
        VECTOR=rows % 4 == 0,
        HAS_BIAS=bias is not None,
        NUM_WARPS=MATMUL_WARPS,
        SHARED_KB=MATMUL_KB,
        PDL=pdl,
        num_warps=MATMUL_WARPS,
        num_stages=1,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


MAX_SIBLINGS = 4


def _default_launch(x: torch.Tensor, counts: list[int], tiles: int, layout: TileLayout, fp8: bool = False) -> LinearLaunch | RingLaunch:
    shape = (x.shape[0], sum(counts), tiles)
    stream_bytes = row_bytes(layout.stream_words)
    if fp8:
        return fp8_launch(*shape, multiprocessors(x.device) if x.is_cuda else 1, stream_bytes)
    stored = stored_launch(*shape, stream_bytes, x.device) if x.is_cuda else None
    return stored or linear_launch(*shape, multiprocessors(x.device) if x.is_cuda else 1, stream_bytes, ring_products(x.device))


def fused_linear(
    x: torch.Tensor,
    qdata: torch.Tensor | Sequence[torch.Tensor],
    act_pre_scale: torch.Tensor | None,
    bias: torch.Tensor | Sequence[torch.Tensor] | None,
    layout: TileLayout,
    seed: int,
    launch: LinearLaunch | RingLaunch | None = None,
    residual: torch.Tensor | None = None,
    prologue: Prologue = NO_PROLOGUE,
    rotated: tuple[torch.Tensor, torch.Tensor] | None = None,
    fp8: bool = False,
) -> torch.Tensor:
    """The fused linear layer: two kernels.

    Args:
        x: `[M, in_features]`, last dimension contiguous.
        qdata: `[N, tiles, words]`, or up to four siblings of one layout, which multiply the same activations in one launch.
        act_pre_scale: `[in_features]` or None.
        bias: `[N]` or None; for siblings one each, or None for all.
        residual: `[M, N]`, last dimension contiguous, added to the result before it is rounded.
        prologue: what happens to `x` first.
        rotated: what `rotate_quantize` made of `x`, where it is there already; made here if it is None or padded otherwise.
        fp8: products of e4m3 with a scale per row, as `rotate` and `decode` make them, instead of int8; sm_90.

    Returns:
        `[M, N]` in the dtype of `x`; for siblings their rows one after the other.
    """
    weights = [qdata] if isinstance(qdata, torch.Tensor) else list(qdata)
    biases = [bias] * len(weights) if bias is None or isinstance(bias, torch.Tensor) else list(bias)
    if not 1 <= len(weights) <= MAX_SIBLINGS or len(biases) != len(weights):
        raise ValueError(f"qdata must be 1 to {MAX_SIBLINGS} weights with a bias each or None, got {len(weights)} and {len(biases)}")
    batch, (_, tiles, words) = x.shape[0], weights[0].shape
    counts = [weight.shape[0] for weight in weights]
    rows = sum(counts)
    largest = max(weight.numel() for weight in weights)
    if largest >= 2**31 or (batch + 64) * tiles * layout.tile >= 2**31:
        raise ValueError(f"the kernel's offsets have 31 bits, got {largest} words and {batch} x {tiles * layout.tile} activations")
    out = torch.empty((batch, rows), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if launch is None:
        launch = _default_launch(x, counts, tiles, layout, fp8)
    if fp8 != (isinstance(launch, RingLaunch) and launch.fp8):
        raise ValueError(f"launch must be for the products asked for, fp8={fp8}, got {launch}")
    stream_bytes = row_bytes(layout.stream_words) if x.is_cuda else 0
    if launch.num_warps > decode_warps(stream_bytes):
        raise ValueError(f"num_warps must be at most {decode_warps(stream_bytes)} for {layout}, got {launch.num_warps}")
    columns = launch.columns
    padded = -(-batch // columns) * columns
    if isinstance(launch, RingLaunch):
        kernel, ring = ring_linear_kernel, columns
        splits = 1 if launch.cluster else launch.splits
        # the interpreter knows no scalars that differ from warp to warp
        rows_of_block = WARP_ROWS * launch.num_warps // (launch.sharing if x.is_cuda else 1)
        grid = (sum(-(-n // rows_of_block) for n in counts), splits, padded // columns)
        counters = grid[0] * launch.num_warps * grid[2] if splits > 1 else 0
        shape = _ring_arguments(launch, layout, stream_bytes, counts, out, residual)
    else:
        kernel, ring, counters, shape = linear_kernel, 0, 0, {}
        most = most_strips(columns, launch.num_warps, stream_bytes)
        dealt = deal_blocks(counts, launch.blocks, most)
        grid = (sum(dealt), padded // columns)
    if rotated is None or rotated[0].shape != rotated_shape(layout, tiles, padded, ring):
        q, scale, zeros = rotate_quantize(x, act_pre_scale, layout, tiles, seed, padded, counters, prologue, ring, fp8)
    else:
        (q, scale), zeros = rotated, torch.zeros(counters, dtype=torch.int32, device=x.device)
    if ring:
        partial = scale
        if counters:
            places = splits * grid[0] * grid[2]
            partial = torch.empty((places, launch.num_warps, WARP_ROWS * columns), dtype=torch.float32, device=x.device)
        parts, dealt = (partial, zeros), ()
    else:
        # as the kernel has it
        dealt = [16 * blocks + -(-n // WARP_ROWS) // max(1, blocks) for n, blocks in zip(counts, dealt, strict=True)]
        parts, dealt = (), dealt + [0] * (MAX_SIBLINGS - len(dealt))
    pdl = dependent_launch(x.device)
    has_bias = biases[0] is not None
    if has_bias and len({b.dtype for b in biases}) > 1:
        biases = [b.float() for b in biases]
    biases = [b.contiguous() for b in biases] if has_bias else [out]
    weights += weights[:1] * (MAX_SIBLINGS - len(weights))
    biases += biases[:1] * (MAX_SIBLINGS - len(biases))
    ahead.launch(
        kernel,
        grid,
        weights[0],
        layout.kernel_tables(x.device),  # of which the first
        q,
        scale,
        biases[0],
        out,
        *parts,
        batch,
        padded,
        counts[0],
        tiles,
        out if residual is None else residual,
        0 if residual is None else residual.stride(0),
        *weights[1:],
        *biases[1:],
        *(counts[1:] + [0] * (MAX_SIBLINGS - len(counts))),
        *dealt,
        LATTICE=layout.lattice,
        K=layout.rice_parameter,
        SHIFT=layout.kernel_shift,
        GAIN=layout.kernel_shift - layout.shift,
        LENGTH_PLACE=layout.kernel_length_place,
        TILE=layout.tile,
        WORDS=words,
        RAW=layout.raw_words,
        WALL_UNIT=layout.wall_unit,
        ALIGNED=_aligned(layout),
        ROW_BYTES=stream_bytes,
        COLUMNS=columns,
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=residual is not None,
        SIBLINGS=len(counts),
        NUM_WARPS=launch.num_warps,
        num_warps=launch.num_warps,
        PDL=pdl,
        **shape,
        num_stages=1,
        **({"maxnreg": launch.registers} if launch.registers else {}),
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


def _ring_arguments(
    launch: RingLaunch, layout: TileLayout, stream_bytes: int, counts: list[int], out: torch.Tensor, residual: torch.Tensor | None
) -> dict:
    """Compile-time arguments of a ring."""
    blocks = max(1, ring_warps(launch.registers) // launch.num_warps)
    stageable = out.is_cuda and stages_tiles(layout)
    steps, stages, staged, kilobytes = ring_shape(
        launch.columns, launch.num_warps, blocks, layout.words, stream_bytes, stageable, launch.fp8, launch.sharing
    )
    vector = all(n % 4 == 0 for n in counts) and (residual is None or (residual.stride(0) % 4 == 0 and ahead.is_aligned(residual)))
    # the interpreter has no clusters
    parts = launch.splits if launch.cluster and out.is_cuda else 1
    return {
        "FP8": launch.fp8,
        "LARGEST": layout.largest_value,
        "SPLIT": launch.splits > 1 and not launch.cluster,
        "PARTS": parts,
        "SHARING": launch.sharing if out.is_cuda else 1,
        "VECTOR": vector,
        "STEPS": steps,
        "STAGES": stages,
        "STAGED": staged,
        "SHARED_KB": kilobytes,
        **({"num_ctas": parts} if parts > 1 else {}),
    }


def sibling_linear(
    x: torch.Tensor,
    qdata: list[torch.Tensor],
    act_pre_scale: torch.Tensor | None,
    bias: list[torch.Tensor | None],
    layouts: list[TileLayout],
    seed: int,
    residual: torch.Tensor | None,
    prologue: Prologue,
    fp8: bool = False,
) -> torch.Tensor:
    """`fused_linear` for any number of siblings: `[M, sum N]`. Layouts agree in lattice and tile.

    Neighbours of one layout share a launch; all share the rotation and quantization of `x`.
    """
    groups: list[list[int]] = []
    for i, layout in enumerate(layouts):
        if groups and len(groups[-1]) < MAX_SIBLINGS and layouts[groups[-1][0]] == layout:
            groups[-1].append(i)
        else:
            groups.append([i])
    rotated = None
    if len(groups) > 1 and x.shape[0] > 0:
        launch = _default_launch(x, [qdata[i].shape[0] for i in groups[0]], qdata[0].shape[1], layouts[0], fp8)
        columns = launch.columns
        padded = -(-x.shape[0] // columns) * columns
        ring = columns if isinstance(launch, RingLaunch) else 0
        rotated = rotate_quantize(x, act_pre_scale, layouts[0], qdata[0].shape[1], seed, padded, 0, prologue, ring, fp8)[:2]
    outs = []
    for group in groups:
        biases = None
        if any(bias[i] is not None for i in group):
            biases = [x.new_zeros(qdata[i].shape[0]) if bias[i] is None else bias[i] for i in group]
        words = [qdata[i] for i in group]
        outs.append(fused_linear(x, words, act_pre_scale, biases, layouts[group[0]], seed, None, residual, prologue, rotated, fp8))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def decode(
    qdata: torch.Tensor,
    layout: TileLayout,
    dtype: torch.dtype,
    row_scale: bool = False,
    out: torch.Tensor | None = None,
    blocks: int | None = None,
    after_rotation: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Decode a weight.

    Args:
        qdata: `[N, tiles, words]` int32.
        dtype: int8 for codes; or of the rotated weight: fp32, bf16, fp16 or float8_e4m3fn.
        row_scale: divide each row by a scale that brings what its tiles can hold into the range of e4m3.
        out: where to write it, contiguous, or None.
        blocks: thread blocks whose warps the tiles of all rows are dealt to; None chooses.
        after_rotation: the kernel before is `rotate`'s or the decoder after it, with which this one may run at the same time.

    Returns:
        `[N, tiles * tile]`, and for codes the scales `[N, tiles]`, for `row_scale` the scales `[N]`, fp32.
    """
    rows, tiles, _ = qdata.shape
    codes = dtype == torch.int8
    if out is None:
        out = torch.empty((rows, tiles * layout.tile), dtype=dtype, device=qdata.device)
    scale = None
    if codes or row_scale:
        scale = torch.empty((rows, tiles) if codes else rows, dtype=torch.float32, device=qdata.device)
    if out.numel() == 0:
        return out, scale
    placeholder = qdata
    _launch_decode(
        qdata,
        layout,
        scale if row_scale else placeholder,
        out,
        scale if codes else placeholder,
        0,
        blocks,
        codes,
        False,
        row_scale,
        after_rotation,
    )
    return out, scale


def decode_blocks(
    qdata: Sequence[torch.Tensor], layouts: Sequence[TileLayout], after_rotation: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of weights one below the other, as `blocked_matmul` takes them.

    Args:
        qdata: `[N, tiles, words]` int32 each; N is a multiple of 64 for all but the last.
        layouts: of each; they agree in lattice and tile.
        after_rotation: the kernel before is `rotate_quantize`'s, made for a decoder, with which this one may run at the same time.

    Returns:
        `[padded N / 64, K / 16, 64, 16]` int8 and `[tiles, padded N]` fp32, N of all weights; nothing is written to rows that pad.
    """
    tiles, tile, device = qdata[0].shape[1], layouts[0].tile, qdata[0].device
    rows = [weight.shape[0] for weight in qdata]
    if any(n % 64 for n in rows[:-1]):
        raise ValueError(f"qdata must have multiples of 64 rows but for the last one, got {rows}")
    padded = -(-sum(rows) // 64) * 64
    codes = torch.empty((padded // 64, tiles * tile // 16, 64, 16), dtype=torch.int8, device=device)
    scale = torch.empty((tiles, padded), dtype=torch.float32, device=device)
    sizes = rows[:-1] + [padded - sum(rows[:-1])]
    parts = zip(qdata, layouts, codes.split([n // 64 for n in sizes]), scale.split(sizes, 1), strict=True)
    for weight, layout, codes_of, scale_of in parts:
        if weight.shape[0]:
            _launch_decode(weight, layout, weight, codes_of, scale_of, padded, None, True, True, False, after_rotation)
    return codes, scale


def _launch_decode(
    qdata: torch.Tensor,
    layout: TileLayout,
    row_scale_out: torch.Tensor,
    out: torch.Tensor,
    scale_out: torch.Tensor,
    scale_rows: int,
    blocks: int | None,
    codes: bool,
    blocked: bool,
    row_scale: bool,
    after_rotation: bool,
) -> None:
    rows, tiles, words = qdata.shape
    stream_bytes = row_bytes(layout.stream_words) if qdata.is_cuda else 0
    num_warps = decode_warps(stream_bytes)
    pdl = after_rotation and dependent_launch(qdata.device)
    if blocks is None:
        blocks = decode_launch_blocks(rows, tiles, num_warps, multiprocessors(qdata.device) if qdata.is_cuda else 1)
    ahead.launch(
        decode_kernel,
        (blocks,),
        qdata,
        layout.table(qdata.device),
        row_scale_out,
        out,
        scale_out,
        rows,
        tiles,
        scale_rows,
        LATTICE=layout.lattice,
        K=layout.rice_parameter,
        SHIFT=layout.shift,
        LENGTH_PLACE=layout.shift + 3,
        TILE=layout.tile,
        WORDS=words,
        RAW=layout.raw_words,
        WALL_UNIT=layout.wall_unit,
        ALIGNED=_aligned(layout),
        ROW_BYTES=stream_bytes,
        CODES=codes,
        BLOCKED=blocked,
        ROW_SCALE=row_scale,
        LARGEST=layout.largest_value,
        NUM_WARPS=num_warps,
        PDL=pdl,
        num_warps=num_warps,
        num_stages=1,
        # two blocks on a multiprocessor
        maxnreg=min(255, 65536 // (2 * 32 * num_warps)),
        **({"launch_pdl": True} if pdl else {}),
    )


def stages_tiles(layout: TileLayout) -> bool:
    """Whether the kernel with a ring can take whole tiles through shared memory: where 16-byte loads are unrolled, and tiles are small."""
    chunked = _aligned(layout) and layout.lattice != "d4" and layout.groups <= 4 and layout.rice_parameter * layout.groups % 4 == 0
    return chunked and layout.words <= 64 and row_bytes(layout.stream_words) > 0


def _aligned(layout: TileLayout) -> bool:
    """Whether raw and stream planes of all tiles start at 16 bytes."""
    return layout.words % 4 == 0 and layout.raw_words % 4 == 0
