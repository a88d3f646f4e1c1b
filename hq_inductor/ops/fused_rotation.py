"""Launches: activations to rotated int8, e4m3 or floats, tile by tile or row by row."""

from __future__ import annotations

import dataclasses

import torch
import triton

from ..format.codes import CodesLayout
from ..format.hadamard import hadamard_block
from ..format.layout import TileLayout
from . import ahead
from .kernels.activations import fp8_scale_kernel, rotate_kernel, rotate_quantize_kernel, row_statistics_kernel
from .kernels.rotate_row import rotate_row_kernel
from .launch import MOST_ROW, RowLaunch, dependent_launch, many_coefficients, row_launch
from .prologue import NO_PROLOGUE, NORMS, Prologue


def _rotation(layout: TileLayout | CodesLayout, act_pre_scale: torch.Tensor | None, seed: int, prologue: Prologue) -> dict:
    """Compile-time arguments of `hq_inductor.ops.kernels.activations.rotate`."""
    block = hadamard_block(layout.tile)
    return {
        "TILE": layout.tile,
        "BLOCK": block,
        "PARTS": triton.next_power_of_2(layout.tile // block),
        "SEED": seed,
        "HAS_SCALE": act_pre_scale is not None,
        "PROLOGUE": prologue.name.removesuffix("_1p"),
        "ADD_ONE": prologue.name.endswith("_1p"),
        "HAS_WEIGHT": prologue.weight is not None,
        "HAS_BIAS": prologue.bias is not None,
        "NORM_ROWS": _norm_rows(prologue) > 1,
    }


def _norm_rows(prologue: Prologue) -> int:
    """Rows of a norm's weight and bias, `[rows, K]` or `[K]`."""
    given = prologue.bias if prologue.weight is None else prologue.weight
    return 1 if given is None or given.dim() == 1 else given.shape[0]


def _norm_strides(prologue: Prologue, batch: int) -> tuple[Prologue, int, int]:
    """The prologue with rows of weight and bias equally far apart, that distance, and how many activations share one."""
    rows = _norm_rows(prologue)
    if rows == 1:
        return prologue, 0, 1
    strides = [tensor.stride(0) for tensor in (prologue.weight, prologue.bias) if tensor is not None]
    if len(set(strides)) > 1:
        prologue = dataclasses.replace(prologue, weight=prologue.weight.contiguous(), bias=prologue.bias.contiguous())
        strides = [prologue.weight.stride(0)]
    return prologue, strides[0], max(1, batch // rows)


def _vector(tensor: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    """A pointer argument `[K]`, or rows of them, that may be missing."""
    return placeholder if tensor is None else tensor if tensor.dim() == 2 else tensor.contiguous()


def _aligned_rows(*matrices: torch.Tensor) -> bool:
    return all(matrix.shape[1] % 16 == 0 and matrix.stride(0) % 16 == 0 for matrix in matrices)


def rotated_shape(layout: TileLayout, tiles: int, padded: int, ring: int) -> tuple[int, ...]:
    """Shape of `rotate_quantize`'s activations."""
    features = tiles * layout.tile
    return (padded // ring, features // 16, ring, 16) if ring else (features // 64, padded, 64)


def rotate_quantize(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor | None,
    layout: TileLayout,
    tiles: int,
    seed: int,
    padded: int,
    counters: int,
    prologue: Prologue = NO_PROLOGUE,
    ring: int = 0,
    fp8: bool = False,
    before_decoder: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated activations as the fused linear layer reads them.

    Args:
        x: `[M, in_features]`, last dimension contiguous.
        padded: rows of the result, at least M.
        counters: length of the zeros that come along.
        prologue: what happens to `x` first; its gate is `[M, in_features]`, weight and bias `[in_features]` or `[rows, in_features]`, where
            M is a multiple of rows and each is for M / rows in a row; last dimensions contiguous.
        ring: batch columns of a block whose activations come through a ring, or 0.
        fp8: e4m3 instead of int8.
        before_decoder: the next kernel is the decoder.

    Returns:
        int8 or e4m3 of `rotated_shape` (`hq_inductor.ops.kernels.activations`), fp32 scales `[tiles, padded]` or `[padded]`, int32 zeros.

    Raises:
        ValueError: rows are too long for e4m3.
    """
    q = torch.empty(rotated_shape(layout, tiles, padded, ring), dtype=torch.float8_e4m3fn if fp8 else torch.int8, device=x.device)
    scale = torch.empty(padded if fp8 else (tiles, padded), dtype=torch.float32, device=x.device)
    zeros = torch.empty(counters, dtype=torch.int32, device=x.device)
    row = _row_launch(x.shape[0], tiles, layout) if fp8 or _whole_rows(x, prologue) else None
    if fp8 and row is None:
        raise ValueError(
            f"x must have tiles of at most {MOST_ROW} coefficients, their number padded to a power of two, got {tuple(x.shape)}"
        )
    if row is not None:
        _rotate_rows(x, act_pre_scale, q, scale, zeros, layout, tiles, padded, seed, prologue, row, ring, before_decoder)
        return q, scale, zeros
    pdl = dependent_launch(x.device)
    prologue, stride_norm, period = _norm_strides(prologue, x.shape[0])
    gate = x if prologue.gate is None else prologue.gate
    ahead.launch(
        rotate_quantize_kernel,
        (padded, tiles),
        x,
        gate,
        _vector(prologue.weight, x),
        _vector(prologue.bias, x),
        _vector(act_pre_scale, x),
        q,
        scale,
        zeros,
        x.shape[0],
        padded,
        x.shape[1],
        x.stride(0),
        gate.stride(0),
        stride_norm,
        period,
        counters,
        prologue.eps,
        **_rotation(layout, act_pre_scale, seed, prologue),
        LATTICE=layout.lattice,
        ALIGNED=_aligned_rows(x, gate) and stride_norm % 16 == 0,
        PDL=pdl,
        BEFORE_DECODER=before_decoder,
        RING=ring,
        num_warps=1,
        **({"launch_pdl": True} if pdl else {}),
    )
    return q, scale, zeros


def _rotate_rows(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor | None,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    zeros: torch.Tensor | None,
    layout: TileLayout | CodesLayout,
    tiles: int,
    padded: int,
    seed: int,
    prologue: Prologue,
    launch: RowLaunch,
    ring: int = 0,
    before_decoder: bool = True,
) -> None:
    """A program for each of `padded` rows; arguments as of `rotate_quantize`, without zeros to be written the order is `rotate`'s."""
    prologue, stride_norm, period = _norm_strides(prologue, x.shape[0])
    gate = x if prologue.gate is None else prologue.gate
    pdl = dependent_launch(x.device)
    ahead.launch(
        rotate_row_kernel,
        (padded,),
        x,
        gate,
        _vector(prologue.weight, x),
        _vector(prologue.bias, x),
        _vector(act_pre_scale, x),
        out,
        x if scale is None else scale,
        x if zeros is None else zeros,
        x.shape[0],
        padded,
        x.shape[1],
        x.stride(0),
        gate.stride(0),
        stride_norm,
        period,
        tiles,
        0 if zeros is None else zeros.shape[0],
        prologue.eps,
        **_rotation(layout, act_pre_scale, seed, prologue),
        TILES=launch.tiles,
        LATTICE=layout.lattice,
        ALIGNED=_aligned_rows(x, gate) and stride_norm % 16 == 0,
        PDL=pdl,
        BEFORE_DECODER=before_decoder,
        PLAIN=zeros is None,
        RING=ring,
        NUM_WARPS=launch.num_warps,
        num_warps=launch.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )


def _whole_rows(x: torch.Tensor, prologue: Prologue) -> bool:
    """Whether int8 and floating point go row by row: there are many, and threads load 16 bytes as they lie."""
    return many_coefficients(*x.shape) and _aligned_rows(x, x if prologue.gate is None else prologue.gate)


def _row_launch(batch: int, tiles: int, layout: TileLayout | CodesLayout) -> RowLaunch | None:
    block = hadamard_block(layout.tile)
    return row_launch(batch, tiles, block, triton.next_power_of_2(layout.tile // block))


def rotate(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor | None,
    layout: TileLayout | CodesLayout,
    tiles: int,
    seed: int,
    dtype: torch.dtype,
    prologue: Prologue = NO_PROLOGUE,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotated activations of large batches.

    Args:
        x: `[M, in_features]`, last dimension contiguous; missing columns are zeros.
        dtype: a floating point dtype, float8_e4m3fn or int8.
        prologue: as for `rotate_quantize`.

    Returns:
        `[M, tiles * tile]` in `dtype`, and fp32 scales: `[tiles, M]` of int8, `[M]` of e4m3, else None.
    """
    batch, features = x.shape
    out = torch.empty((batch, tiles * layout.tile), dtype=dtype, device=x.device)
    fp8 = dtype == torch.float8_e4m3fn
    scale = None
    if fp8 or dtype == torch.int8:
        scale = torch.empty(batch if fp8 else (tiles, batch), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, scale
    # of e4m3 even few: tile by tile, a row would be read twice
    if fp8 or _whole_rows(x, prologue):
        row = _row_launch(batch, tiles, layout)
        if row is not None:
            _rotate_rows(x, act_pre_scale, out, scale, None, layout, tiles, batch, seed, prologue, row)
            return out, scale
    prologue, stride_norm, period = _norm_strides(prologue, batch)
    gate = x if prologue.gate is None else prologue.gate
    scalars = (features, x.stride(0), gate.stride(0), stride_norm, period, tiles)
    rotation = _rotation(layout, act_pre_scale, seed, prologue)
    aligned = _aligned_rows(x, gate) and stride_norm % 16 == 0
    statistics = x
    if prologue.name in NORMS:
        statistics = torch.empty((batch, 2), dtype=torch.float32, device=x.device)
        ahead.launch(
            row_statistics_kernel,
            (batch,),
            x,
            statistics,
            features,
            x.stride(0),
            prologue.eps,
            PROLOGUE=prologue.name.removesuffix("_1p"),
            ALIGNED=_aligned_rows(x),
            num_warps=4,
        )
    pointers = (x, gate, _vector(prologue.weight, x), _vector(prologue.bias, x), statistics, _vector(act_pre_scale, x))
    if fp8:
        kept = {key: value for key, value in rotation.items() if key not in ("BLOCK", "PARTS", "SEED")}
        padded = triton.next_power_of_2(layout.tile)
        ahead.launch(
            fp8_scale_kernel,
            (batch,),
            *pointers,
            scale,
            *scalars,
            **kept,
            PADDED=padded,
            ALIGNED=aligned,
            num_warps=1 if batch >= 1024 else 4,
        )
    pdl = dependent_launch(x.device)
    ahead.launch(
        rotate_kernel,
        (batch, tiles),
        *pointers,
        out,
        x if scale is None else scale,
        *scalars,
        **rotation,
        LATTICE=layout.lattice,
        ALIGNED=aligned,
        PDL=pdl,
        num_warps=1,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out, scale


def fp8_rows_fit(x: torch.Tensor, layout: TileLayout, tiles: int) -> bool:
    """Whether `fused_linear` takes activations `[M, K]` as e4m3."""
    return _row_launch(x.shape[0], tiles, layout) is not None
