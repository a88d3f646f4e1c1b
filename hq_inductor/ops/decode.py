"""`hyperquant::rice_decode` and `hyperquant::lattice_dequant`: words to codes to floats."""

from __future__ import annotations

import torch

from ..format.lattice import embed
from ..format.layout import LATTICES, TileLayout
from ..format.rice import decode_tiles
from .registry import check_codes, check_qdata, register

# the specification keeps some 64 bytes per weight alive; blocks of tiles bound that
_BLOCK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 24}


def decode_words(qdata: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[N, K]` int8 and scales `[N, K / tile]` fp32 of words `[N, K / tile, words]`."""
    rows, tiles, words = qdata.shape
    flat = qdata.reshape(-1, words)
    codes = qdata.new_empty((flat.shape[0], layout.tile), dtype=torch.int8)
    scale = qdata.new_empty(flat.shape[0], dtype=torch.float32)
    step = max(1, _BLOCK_WEIGHTS[qdata.device.type] // layout.tile)
    for begin in range(0, flat.shape[0], step):
        block = slice(begin, begin + step)
        codes[block], scale[block] = decode_tiles(flat[block], layout)
    return codes.view(rows, tiles * layout.tile), scale.view(rows, tiles)


def _rice_decode(qdata: torch.Tensor, lattice: str, tile: int, code: int) -> tuple[torch.Tensor, torch.Tensor]:
    return decode_words(qdata, check_qdata(qdata, lattice, tile, code))


def _rice_decode_cuda(qdata: torch.Tensor, lattice: str, tile: int, code: int) -> tuple[torch.Tensor, torch.Tensor]:
    from .fused import decode  # Triton is there on Linux only

    return decode(qdata.contiguous(), check_qdata(qdata, lattice, tile, code), torch.int8)


def _rice_decode_fake(qdata, lattice, tile, code):
    check_qdata(qdata, lattice, tile, code)
    rows, tiles, _ = qdata.shape
    return qdata.new_empty((rows, tiles * tile), dtype=torch.int8), qdata.new_empty((rows, tiles), dtype=torch.float32)


register(
    "rice_decode(Tensor qdata, str lattice, int tile, int code) -> (Tensor codes, Tensor scale)",
    _rice_decode_fake,
    CPU=_rice_decode,
    CUDA=_rice_decode_cuda,
)


def _lattice_dequant(codes: torch.Tensor, scale: torch.Tensor, lattice: str, dtype: torch.dtype) -> torch.Tensor:
    tile = _check_dequant(codes, scale, lattice, dtype)
    points = embed(codes, lattice).unflatten(-1, (-1, tile))
    return points.mul_(scale[..., None]).flatten(-2).to(dtype)


def _check_dequant(codes: torch.Tensor, scale: torch.Tensor, lattice: str, dtype: torch.dtype) -> int:
    if lattice not in LATTICES:
        raise ValueError(f"lattice must be one of {', '.join(LATTICES)}, got {lattice!r}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    return check_codes(codes, scale, lattice)


def _lattice_dequant_fake(codes, scale, lattice, dtype):
    _check_dequant(codes, scale, lattice, dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


register(
    "lattice_dequant(Tensor codes, Tensor scale, str lattice, ScalarType dtype) -> Tensor",
    _lattice_dequant_fake,
    CPU=_lattice_dequant,
    CUDA=_lattice_dequant,
)
