"""Launches: activations to rotated int8, words and int8 to outputs, words to weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from ..format.hadamard import hadamard_block
from ..format.layout import TileLayout
from .kernels.activations import rotate_kernel, rotate_quantize_kernel
from .kernels.decode import decode_kernel
from .kernels.linear import linear_kernel
from .kernels.matmul import int8_matmul_kernel
from .kernels.rows import fp8_scale_kernel, rotate_fp8_kernel, rotate_int8_kernel
from .kernels.shared import row_bytes
from .launch import (
    WARP_ROWS,
    LinearLaunch,
    MatmulLaunch,
    decode_parts,
    decode_warps,
    dependent_launch,
    linear_launch,
    matmul_launch,
    multiprocessors,
)


def _rotation(layout: TileLayout, act_pre_scale: torch.Tensor | None, seed: int) -> dict:
    """Compile-time arguments of `hq_inductor.ops.kernels.activations.rotate`."""
    block = hadamard_block(layout.tile)
    parts = triton.next_power_of_2(layout.tile // block)
    return {"TILE": layout.tile, "BLOCK": block, "PARTS": parts, "SEED": seed, "HAS_SCALE": act_pre_scale is not None}


def rotate_quantize(
    x: torch.Tensor, act_pre_scale: torch.Tensor | None, layout: TileLayout, tiles: int, seed: int, padded: int, counters: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated activations as int8.

    Args:
        x: `[M, in_features]`, last dimension contiguous.
        padded: rows of the result, at least M.
        counters: length of the zeros that come along.

    Returns:
        int8 `[tiles * tile / 64, padded, 64]` (`hq_inductor.ops.kernels.activations`), fp32 scales `[tiles, padded]`, int32 zeros.
    """
    q = torch.empty((tiles * layout.tile // 64, padded, 64), dtype=torch.int8, device=x.device)
    scale = torch.empty((tiles, padded), dtype=torch.float32, device=x.device)
    zeros = torch.empty(counters, dtype=torch.int32, device=x.device)
    pdl = dependent_launch(x.device)
    rotate_quantize_kernel[(padded, tiles)](
        x,
        x if act_pre_scale is None else act_pre_scale,
        q,
        scale,
        zeros,
        x.shape[0],
        padded,
        x.shape[1],
        x.stride(0),
        counters,
        **_rotation(layout, act_pre_scale, seed),
        LATTICE=layout.lattice,
        PDL=pdl,
        num_warps=1,
        **({"launch_pdl": True} if pdl else {}),
    )
    return q, scale, zeros


def rotate(
    x: torch.Tensor, act_pre_scale: torch.Tensor | None, layout: TileLayout, tiles: int, seed: int, dtype: torch.dtype
) -> torch.Tensor:
    """`RHT(x * act_pre_scale)`, `[M, tiles * tile]` in `dtype`, of `[M, in_features]` with contiguous rows; missing columns are zeros."""
    out = torch.empty((x.shape[0], tiles * layout.tile), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    rotate_kernel[(x.shape[0], tiles)](
        x,
        x if act_pre_scale is None else act_pre_scale,
        out,
        x.shape[1],
        x.stride(0),
        tiles,
        **_rotation(layout, act_pre_scale, seed),
        num_warps=1,
    )
    return out


def rotate_int8(
    x: torch.Tensor, act_pre_scale: torch.Tensor | None, layout: TileLayout, tiles: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated activations of `[M, in_features]` as int8 `[M, tiles * tile]`, with their scales `[tiles, M]` fp32."""
    q = torch.empty((x.shape[0], tiles * layout.tile), dtype=torch.int8, device=x.device)
    scale = torch.empty((tiles, x.shape[0]), dtype=torch.float32, device=x.device)
    if q.numel() == 0:
        return q, scale
    rotate_int8_kernel[(x.shape[0], tiles)](
        x,
        x if act_pre_scale is None else act_pre_scale,
        q,
        scale,
        x.shape[1],
        x.stride(0),
        tiles,
        **_rotation(layout, act_pre_scale, seed),
        LATTICE=layout.lattice,
        num_warps=1,
    )
    return q, scale


def rotate_fp8(
    x: torch.Tensor, act_pre_scale: torch.Tensor | None, layout: TileLayout, tiles: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated activations of `[M, in_features]` as e4m3 `[M, tiles * tile]`, with a scale per row `[M]` fp32."""
    columns = tiles * layout.tile
    q = torch.empty((x.shape[0], columns), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if q.numel() == 0:
        return q, scale
    pre_scale = x if act_pre_scale is None else act_pre_scale
    rotation = _rotation(layout, act_pre_scale, seed)
    fp8_scale_kernel[(x.shape[0],)](
        x,
        pre_scale,
        scale,
        x.shape[1],
        x.stride(0),
        tiles,
        TILE=layout.tile,
        PADDED=triton.next_power_of_2(layout.tile),
        HAS_SCALE=act_pre_scale is not None,
        num_warps=1 if x.shape[0] >= 1024 else 4,
    )
    rotate_fp8_kernel[(x.shape[0], tiles)](x, pre_scale, q, scale, x.shape[1], x.stride(0), tiles, **rotation, num_warps=1)
    return q, scale


def int8_matmul(
    x: torch.Tensor,
    act_scale: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    launch: MatmulLaunch | None = None,
) -> torch.Tensor:
    """`[M, N]` in `dtype` from `rotate_int8` and `decode`.

    Args:
        x: `[M, K]` int8, with scales `act_scale`, `[tiles, M]` fp32.
        codes: `[N, K]` int8, with scales `scale`, `[N, tiles]` fp32.
        bias: `[N]` or None.
    """
    (batch, columns), (rows, tiles) = x.shape, scale.shape
    launch = launch or matmul_launch(batch, rows, tiles, multiprocessors(x.device))
    split = launch.splits > 1
    shape = (launch.splits, batch, rows) if split else (batch, rows)
    out = torch.empty(shape, dtype=torch.float32 if split else dtype, device=x.device)
    if out.numel() == 0:
        return out.sum(0).to(dtype) if split else out
    int8_matmul_kernel[(-(-batch // launch.block_m) * -(-rows // launch.block_n), launch.splits)](
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


MAX_SIBLINGS = 4


def int8_linear(
    x: torch.Tensor,
    qdata: torch.Tensor | Sequence[torch.Tensor],
    act_pre_scale: torch.Tensor | None,
    bias: torch.Tensor | Sequence[torch.Tensor] | None,
    layout: TileLayout,
    seed: int,
    launch: LinearLaunch | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The fused linear layer: two kernels.

    Args:
        x: `[M, in_features]`, last dimension contiguous.
        qdata: `[N, tiles, words]`, or up to four siblings of one layout, which multiply the same activations in one launch.
        act_pre_scale: `[in_features]` or None.
        bias: `[N]` or None; for siblings one each, or None for all.
        residual: `[M, N]`, last dimension contiguous, added to the result before it is rounded.

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
    if launch is None:
        processors = multiprocessors(x.device) if x.is_cuda else 1
        launch = linear_launch(batch, rows, tiles, processors, row_bytes(layout.stream_words))
    buffer_bytes = row_bytes(layout.stream_words) if x.is_cuda else 0
    if launch.num_warps > decode_warps(buffer_bytes):
        raise ValueError(f"num_warps must be at most {decode_warps(buffer_bytes)} for {layout}, got {launch.num_warps}")
    out = torch.empty((batch, rows), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    columns, splits = launch.columns, launch.splits
    padded = -(-batch // columns) * columns
    grid = (sum(-(-n // (WARP_ROWS * launch.num_warps)) for n in counts), splits, padded // columns)
    counters = grid[0] * launch.num_warps * grid[2] if splits > 1 else 0
    q, scale, zeros = rotate_quantize(x, act_pre_scale, layout, tiles, seed, padded, counters)
    pdl = dependent_launch(x.device)
    partial = torch.empty((splits, padded, rows), dtype=torch.float32, device=x.device) if splits > 1 else scale
    has_bias = biases[0] is not None
    if has_bias and len({b.dtype for b in biases}) > 1:
        biases = [b.float() for b in biases]
    biases = [b.contiguous() for b in biases] if has_bias else [out]
    weights += weights[:1] * (MAX_SIBLINGS - len(weights))
    biases += biases[:1] * (MAX_SIBLINGS - len(biases))
    linear_kernel[grid](
        weights[0],
        layout.kernel_tables(x.device),
        q,
        scale,
        biases[0],
        out,
        partial,
        zeros,
        batch,
        padded,
        counts[0],
        tiles,
        out if residual is None else residual,
        0 if residual is None else residual.stride(0),
        *weights[1:],
        *biases[1:],
        *(counts[1:] + [0] * (MAX_SIBLINGS - len(counts))),
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
        ROW_BYTES=buffer_bytes,
        COLUMNS=columns,
        SPLIT=splits > 1,
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=residual is not None,
        SIBLINGS=len(counts),
        NUM_WARPS=launch.num_warps,
        num_warps=launch.num_warps,
        PDL=pdl,
        num_stages=1,
        **({"maxnreg": launch.registers} if launch.registers else {}),
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


def decode(
    qdata: torch.Tensor, layout: TileLayout, dtype: torch.dtype, row_scale: bool = False, parts: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Decode a weight.

    Args:
        qdata: `[N, tiles, words]` int32.
        dtype: int8 for codes; or of the rotated weight: fp32, bf16, fp16 or float8_e4m3fn.
        row_scale: divide each row by a scale that brings what its tiles can hold into the range of e4m3.
        parts: blocks that share the tiles of a row; None chooses.

    Returns:
        `[N, tiles * tile]`, and for codes the scales `[N, tiles]`, for `row_scale` the scales `[N]`, fp32.
    """
    rows, tiles, words = qdata.shape
    codes = dtype == torch.int8
    out = torch.empty((rows, tiles * layout.tile), dtype=dtype, device=qdata.device)
    scale = None
    if codes or row_scale:
        scale = torch.empty((rows, tiles) if codes else rows, dtype=torch.float32, device=qdata.device)
    if out.numel() == 0:
        return out, scale
    buffer_bytes = row_bytes(layout.stream_words) if qdata.is_cuda else 0
    num_warps = decode_warps(buffer_bytes)
    blocks = -(-rows // (WARP_ROWS * num_warps))
    if parts is None:
        parts = decode_parts(blocks, tiles, multiprocessors(qdata.device)) if qdata.is_cuda else 1
    placeholder = qdata
    decode_kernel[(blocks, parts)](
        qdata,
        layout.kernel_tables(qdata.device, plain=True),
        scale if row_scale else placeholder,
        out,
        scale if codes else placeholder,
        rows,
        tiles,
        LATTICE=layout.lattice,
        K=layout.rice_parameter,
        SHIFT=layout.shift,
        LENGTH_PLACE=layout.shift + 3,
        TILE=layout.tile,
        WORDS=words,
        RAW=layout.raw_words,
        WALL_UNIT=layout.wall_unit,
        ALIGNED=_aligned(layout),
        ROW_BYTES=buffer_bytes,
        CODES=codes,
        ROW_SCALE=row_scale,
        LARGEST=layout.largest_value,
        NUM_WARPS=num_warps,
        num_warps=num_warps,
        num_stages=1,
    )
    return out, scale


def _aligned(layout: TileLayout) -> bool:
    """Whether raw and stream planes of all tiles start at 16 bytes."""
    return layout.words % 4 == 0 and layout.raw_words % 4 == 0
