"""`hyperquant::lattice_quantize` and `hyperquant::rice_encode`: coefficients to codes to words."""

from __future__ import annotations

import torch

from ..format.quantizer import check_effort, quantize_tiles
from ..format.rice import encode_tiles
from .registry import check_codes, check_floating, register, tile_layout

# tiles are processed in blocks of about this many weights, so that encoding needs little memory beside the weight itself
_BLOCK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 24}


def _quantize_alloc(x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_floating("x", x)
    if x.dim() != 2 or x.shape[1] % tile:
        raise ValueError(f"x must be [N, K] with K a multiple of tile={tile}, got shape {tuple(x.shape)}")
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], x.shape[1] // tile), dtype=torch.float32)


def _lattice_quantize(
    x: torch.Tensor, lattice: str, tile: int, code: int, words: int, start_rms: float, effort: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = tile_layout(lattice, tile, code, words)
    codes, scale = _quantize_alloc(x, tile)
    tiles = x.reshape(-1, tile)
    codes_out, scale_out = codes.view(-1, tile), scale.view(-1)
    step = max(1, _BLOCK_WEIGHTS[x.device.type] // tile)
    for begin in range(0, tiles.shape[0], step):
        rows = slice(begin, begin + step)
        codes_out[rows], scale_out[rows] = quantize_tiles(tiles[rows].to(torch.float32), layout, start_rms, effort)
    return codes, scale


def _lattice_quantize_fake(x, lattice, tile, code, words, start_rms, effort=1):
    check_effort(effort)
    tile_layout(lattice, tile, code, words)
    return _quantize_alloc(x, tile)


register(
    "lattice_quantize(Tensor x, str lattice, int tile, int code, int words, float start_rms, int effort=1) -> (Tensor codes, Tensor scale)",
    _lattice_quantize_fake,
    CPU=_lattice_quantize,
    CUDA=_lattice_quantize,
)


def _encode_alloc(codes: torch.Tensor, scale: torch.Tensor, lattice: str, tile: int, code: int, words: int) -> torch.Tensor:
    tile_layout(lattice, tile, code, words)
    if check_codes(codes, scale, lattice) != tile:
        raise ValueError(f"scale must have one column per tile={tile} of codes, got {tuple(codes.shape)} and {tuple(scale.shape)}")
    return codes.new_empty((*scale.shape, words), dtype=torch.int32)


def _rice_encode(codes: torch.Tensor, scale: torch.Tensor, lattice: str, tile: int, code: int, words: int) -> torch.Tensor:
    layout = tile_layout(lattice, tile, code, words)
    qdata = _encode_alloc(codes, scale, lattice, tile, code, words)
    tiles, scales, out = codes.reshape(-1, tile), scale.reshape(-1), qdata.view(-1, words)
    step = max(1, _BLOCK_WEIGHTS[codes.device.type] // tile)
    for begin in range(0, tiles.shape[0], step):
        rows = slice(begin, begin + step)
        out[rows] = encode_tiles(tiles[rows], scales[rows], layout)
    return qdata


register(
    "rice_encode(Tensor codes, Tensor scale, str lattice, int tile, int code, int words) -> Tensor",
    _encode_alloc,
    CPU=_rice_encode,
    CUDA=_rice_encode,
)
