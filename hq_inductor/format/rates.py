"""From (lattice, bits per scalar, in_features) to a tile layout.

A tile holds `tile * bps / 32` words. Where that is not a whole number it is rounded down, so a rate is never exceeded. Columns are padded
with zeros to a whole number of tiles; the padding counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout import GROUP, LATTICES, MAX_TILE, TileLayout
from .rate_table import RATE_TABLE

MAX_BPS = 6.0
MIN_BPS = {"e8": 1.75, "d4": 2.0, "a2": 2.0, "z": 2.0}
PREFERRED_TILE = 512
# zero columns may add at most this share to a layer's bits before it is better left alone
MAX_PADDING = 0.125


def check_rate(bps: float, lattice: str) -> None:
    """Raise `ValueError` (or `TypeError`) unless the lattice exists and `bps` is one of its rates."""
    if lattice not in LATTICES:
        raise ValueError(f"lattice must be one of {', '.join(map(repr, LATTICES))}, got {lattice!r}")
    if isinstance(bps, bool) or not isinstance(bps, (int, float)):
        raise TypeError(f"bps must be a number, got {type(bps).__name__}")
    if not MIN_BPS[lattice] <= bps <= MAX_BPS or (8 * bps) % 1:
        raise ValueError(f"bps must be a multiple of 1/8 from {MIN_BPS[lattice]} to {MAX_BPS} for lattice {lattice!r}, got {bps}")


def check_tile(tile: int | None) -> None:
    """Raise `ValueError` unless `tile` is None or a tile size of the format."""
    if tile is not None and (not isinstance(tile, int) or tile % GROUP or not GROUP <= tile <= MAX_TILE):
        raise ValueError(f"tile must be None or a multiple of {GROUP} from {GROUP} to {MAX_TILE}, got {tile!r}")


def choose_tile(in_features: int, bps: float) -> int:
    """Tile for a row of `in_features` coefficients.

    Of the tiles that divide the row (padded to a multiple of 128), those that hold a whole number of words come first; among them the
    smallest from 512 up, which makes the 16-bit header cheap without idling a GPU on small layers, otherwise the largest.
    """
    columns = -(-in_features // GROUP) * GROUP
    tiles = [tile for tile in range(GROUP, min(columns, MAX_TILE) + 1, GROUP) if columns % tile == 0]
    whole = [tile for tile in tiles if (tile * bps) % 32 == 0] or tiles
    large = [tile for tile in whole if tile >= PREFERRED_TILE]
    return min(large) if large else max(whole)


def start_rms(bps: float, lattice: str) -> float:
    """Root mean square of coefficient / scale at which tiles of this rate come to rest on N(0, 1)."""
    return RATE_TABLE[lattice][int(8 * bps)].start_rms


@dataclass(frozen=True)
class WeightLayout:
    """How a weight `[N, in_features]` is stored: the tile's layout and the number of tiles per row."""

    in_features: int
    tiles: int
    tile: TileLayout
    start_rms: float

    @property
    def padded_features(self) -> int:
        return self.tiles * self.tile.tile

    @property
    def padding(self) -> float:
        """Share of stored columns beyond `in_features`, relative to `in_features`."""
        return self.padded_features / self.in_features - 1

    @property
    def bits_per_weight(self) -> float:
        """Everything stored, padding included, per weight of the original matrix."""
        return 32 * self.tile.words * self.tiles / self.in_features


def weight_layout(in_features: int, bps: float, lattice: str = "e8", tile: int | None = None) -> WeightLayout:
    """Layout of a weight with `in_features` columns at a rate.

    Args:
        in_features: columns of the weight, at least 1.
        bps: bits per scalar, everything included; a multiple of 1/8.
        lattice: one of `"e8"`, `"d4"`, `"a2"`, `"z"`.
        tile: coefficients per tile; None chooses (`choose_tile`).

    Raises:
        ValueError: an argument is out of range.
    """
    check_rate(bps, lattice)
    check_tile(tile)
    if in_features < 1:
        raise ValueError(f"in_features must be at least 1, got {in_features}")
    if tile is None:
        tile = choose_tile(in_features, bps)
    words = int(tile * bps) // 32
    return WeightLayout(in_features, -(-in_features // tile), TileLayout(lattice, tile, int(8 * bps), words), start_rms(bps, lattice))
