"""`packing="codes"`: a weight as the tensor cores' operands, a byte per coefficient, instead of as words.

Definition.  The rotated weight is `scale * value`, coefficient by coefficient; the values come from the same tiles that words hold.
             int8   lattice codes, embedded (`hq_inductor.format.lattice`); `scale` is the tile's. Exactly what the words say.
             uint8  bits of e4m3 (float8_e4m3fn); `scale` is one per row, `max_t scale_t * largest_value / 448`, as for products in e4m3.
Storage.     `qdata`, int8 or uint8 `[N, tiles, tile]`; `scale`, fp32 as int32 bits, `[N, tiles]` or, for e4m3, `[N, 1]`. Integers, so that
             what changes the floating dtypes of a model leaves them alone.
Cost.        `8 + 32 / tile` bits per coefficient, or `8 + 32 / K`, whatever the rate that the codes were made for. No entropy decoding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .lattice import embed
from .layout import GROUP, LATTICES, MAX_TILE, TileLayout
from .mma import E4M3_MAX

PACKINGS = ("rice", "codes")
# formats that read codes as they lie there; e4m3 is stored for "fp8"
CODES_MMA = ("auto", "int8", "fp8", "bf16")


@dataclass(frozen=True)
class CodesLayout:
    """What `TileLayout` is for words: lattice and tile of codes.

    Raises:
        ValueError: an argument is out of range.
    """

    lattice: str
    tile: int

    def __post_init__(self) -> None:
        if self.lattice not in LATTICES:
            raise ValueError(f"lattice must be one of {', '.join(LATTICES)}, got {self.lattice!r}")
        if self.tile % GROUP or not GROUP <= self.tile <= MAX_TILE:
            raise ValueError(f"tile must be a multiple of {GROUP} from {GROUP} to {MAX_TILE}, got {self.tile}")


codes_layout = functools.lru_cache(maxsize=256)(CodesLayout)


def check_packing(packing: str, mma: str) -> None:
    """Raise `ValueError` unless the packing exists and products in format `mma` can read it."""
    if packing not in PACKINGS:
        raise ValueError(f"packing must be one of {', '.join(map(repr, PACKINGS))}, got {packing!r}")
    if packing == "codes" and mma not in CODES_MMA:
        raise ValueError(f'mma must be one of {", ".join(map(repr, CODES_MMA))} with packing="codes", got {mma!r}')


def pack_codes(codes: torch.Tensor, scale: torch.Tensor, layout: TileLayout, e4m3: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as they are stored.

    Args:
        codes: int8 `[N, K]`.
        scale: fp32 `[N, K / tile]`.
        layout: of the tiles that the codes were made for.
        e4m3: whether to round to e4m3.

    Returns:
        `qdata` and `scale` (see above).
    """
    tiles = codes.unflatten(1, (-1, layout.tile))
    if not e4m3:
        return tiles.contiguous(), scale.view(torch.int32)
    row_scale = (scale.amax(1, keepdim=True) * (layout.largest_value / E4M3_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
    # row by row: a float copy is four times as large
    out = torch.empty_like(tiles, dtype=torch.uint8)
    step = max(1, (1 << 22) // codes.shape[1])
    for begin in range(0, codes.shape[0], step):
        block = slice(begin, begin + step)
        values = embed(tiles[block], layout.lattice).mul_((scale[block] / row_scale[block])[..., None])
        out[block] = values.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return out, row_scale.view(torch.int32)


def coefficients(qdata: torch.Tensor, scale: torch.Tensor, lattice: str, dtype: torch.dtype) -> torch.Tensor:
    """The rotated weight `[N, tiles * tile]` in a floating dtype, from `qdata` and `scale` as stored."""
    wide = torch.promote_types(dtype, torch.float32)
    if qdata.dtype == torch.uint8:
        values = qdata.view(torch.float8_e4m3fn).to(wide)
    else:
        values = embed(qdata, lattice, wide)
    return values.mul_(scale.view(torch.float32)[..., None]).flatten(1).to(dtype)
