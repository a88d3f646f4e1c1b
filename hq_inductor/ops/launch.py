"""Launch configurations of the kernels: frozen data, chosen from shapes on the host."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# rows of a warp, columns of an MMA
WARP_ROWS = 16
MMA_COLUMNS = 8


@dataclass(frozen=True)
class LinearLaunch:
    """How the fused linear kernel is launched.

    Args:
        columns: batch columns per block, a multiple of 8; larger batches take several blocks, each of which decodes anew.
        splits: blocks that share the tiles of a block of rows.
        num_warps: warps per block, each with 16 rows: 1, 2, 4 or 8.
    """

    columns: int
    splits: int
    num_warps: int

    def __post_init__(self) -> None:
        if self.columns % MMA_COLUMNS or not MMA_COLUMNS <= self.columns <= 128:
            raise ValueError(f"columns must be a multiple of {MMA_COLUMNS} from {MMA_COLUMNS} to 128, got {self.columns}")
        if self.splits < 1:
            raise ValueError(f"splits must be at least 1, got {self.splits}")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"num_warps must be 1, 2, 4 or 8, got {self.num_warps}")


@functools.lru_cache(maxsize=32)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=4096)
def linear_launch(batch: int, rows: int, tiles: int, processors: int) -> LinearLaunch:
    """Launch for `[batch, K] x [rows, K]^T`, `tiles` tiles per row."""
    columns = next(c for c in (8, 16, 32, 64) if batch <= c or c == 64)
    num_warps = 8
    blocks = -(-rows // (WARP_ROWS * num_warps)) * -(-batch // columns)
    # two blocks fit a multiprocessor
    splits = max(1, min(tiles, round(2 * processors / blocks)))
    return LinearLaunch(columns, splits, num_warps)
