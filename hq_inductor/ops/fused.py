"""Launches of the fused linear layer: activations to rotated int8, then words and int8 to outputs."""

from __future__ import annotations

import torch
import triton

from ..format.hadamard import hadamard_block
from ..format.layout import TileLayout
from .kernels.activations import rotate_quantize_kernel
from .kernels.linear import linear_kernel
from .kernels.shared import MAX_STAGED_WORDS
from .launch import MMA_COLUMNS, WARP_ROWS, LinearLaunch, linear_launch, multiprocessors


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
    block = hadamard_block(layout.tile)
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
        TILE=layout.tile,
        BLOCK=block,
        PARTS=triton.next_power_of_2(layout.tile // block),
        SEED=seed,
        HAS_SCALE=act_pre_scale is not None,
        LATTICE=layout.lattice,
        num_warps=1,
    )
    return q, scale, zeros


def int8_linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    act_pre_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    layout: TileLayout,
    seed: int,
    launch: LinearLaunch | None = None,
) -> torch.Tensor:
    """`[M, N]` in the dtype of `x`, `[M, in_features]`: two kernels."""
    batch, (rows, tiles, words) = x.shape[0], qdata.shape
    if launch is None:
        processors = multiprocessors(x.device) if x.is_cuda else 1
        launch = linear_launch(batch, rows, tiles, processors)
    out = torch.empty((batch, rows), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    columns, splits = launch.columns, launch.splits
    padded = -(-batch // columns) * columns
    grid = (-(-rows // (WARP_ROWS * launch.num_warps)), splits, padded // columns)
    q, scale, counters = rotate_quantize(x, act_pre_scale, layout, tiles, seed, padded, grid[0] * grid[2] if splits > 1 else 0)
    partial = torch.empty((splits, padded, rows), dtype=torch.float32, device=x.device) if splits > 1 else scale
    linear_kernel[grid](
        qdata,
        layout.table(x.device),
        q,
        scale,
        out if bias is None else bias,
        out,
        partial,
        counters,
        batch,
        padded,
        rows,
        tiles,
        LATTICE=layout.lattice,
        K=layout.rice_parameter,
        SHIFT=layout.shift,
        TILE=layout.tile,
        WORDS=words,
        RAW=layout.raw_words,
        WALL_UNIT=layout.wall_unit,
        ALIGNED=words % 4 == 0 and layout.raw_words % 4 == 0 and layout.stream_words % 4 == 0,
        STAGED=layout.stream_words <= MAX_STAGED_WORDS and x.is_cuda,
        COLUMNS=columns,
        SPLITS=splits,
        HAS_BIAS=bias is not None,
        NUM_WARPS=launch.num_warps,
        num_warps=launch.num_warps,
        num_stages=1,
        **({"maxnreg": 128} if columns >= 64 else {}),
    )
    return out


__all__ = ["MMA_COLUMNS", "int8_linear", "rotate_quantize"]
