"""Launch configurations of the kernels: frozen data, chosen from shapes on the host."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

# largest batch for which "auto" takes the fused kernel: beyond one block of columns it would decode the weight again for each
FUSED_BATCH = 32
# the same where activations come through a ring of shared memory: two blocks of columns are still the fastest
RING_BATCH = 256
# smallest batch for which "auto" multiplies in the activations' dtype where there is no product of groups of four warps with codes in
# blocks: from there on the library's product is the faster one
LIBRARY_BATCH = 2048
# batch columns per block, and the most registers per thread, for two blocks of 8 warps on a multiprocessor
REGISTERS = {8: 128, 16: 128, 32: 128}
# with a ring: the most registers with which a multiprocessor holds 16 warps; left alone the compiler takes 180 to 230, for 8
DENSE_REGISTERS = 128


class RingKind(NamedTuple):
    """A kernel with a ring, by columns and registers, and what a tile takes, in microseconds on an H100 whose multiprocessors have all the
    warps that they hold: `tile`, and `shared` where groups of warps share rows. None: it has been seen to take twice as long."""

    columns: int
    registers: int
    tile: float | None
    shared: float


RING_KINDS = (
    RingKind(64, DENSE_REGISTERS, 6.0, 6.9),
    RingKind(64, 0, 3.1, 3.25),
    RingKind(96, 0, 3.9, 3.97),
    RingKind(128, 0, 3.9, 3.97),
)
RING_COLUMNS = tuple(sorted({kind.columns for kind in RING_KINDS}))
# columns up to which a launch may have more than its batch needs
SPARE_COLUMNS = 32
# of e4m3, whose sums take one register each
FP8_KINDS = (
    RingKind(16, DENSE_REGISTERS, 7.6, 7.8),
    RingKind(32, DENSE_REGISTERS, 8.0, 8.0),
    RingKind(32, 0, None, 3.9),
    RingKind(64, DENSE_REGISTERS, 8.0, 8.7),
    RingKind(64, 0, 3.9, 4.0),
    RingKind(128, 0, 4.5, 4.59),
    RingKind(256, 0, 5.3, 5.72),
)
# blocks of a cluster, and the share of a device's slots that clusters of so many find room in (H200: 264 of 264, 248, 240)
CLUSTER_SHARE = {1: 1.0, 2: 1.0, 4: 0.94, 8: 0.91}
# of the kernel with a ring, in microseconds: the share of a tile's time that is saved where a multiprocessor has few warps; a block's start
# and end; parts that meet in global memory, with up to so many columns; each block that another one of its cluster meets
IDLE_SHARE, RING_START, MEMORY_MEETING, CLUSTER_MEETING = 0.2, 5.0, {128: 6.0, 256: 13.0}, 0.2
# the same of the linear kernel with 32 columns, and blocks of them that it may take in place of a ring
LINEAR_TILE, LINEAR_START, LINEAR_BLOCKS = 5.1, 4.0, 2
# registers for three blocks
TIGHT_REGISTERS = 80
# coefficients of a row that a thread has in registers, and the most warps that have so many
ROW_REGISTERS = 64
MAX_ROW_WARPS = 16
MOST_ROW = 32 * ROW_REGISTERS * MAX_ROW_WARPS
# coefficients from which on whole rows are rotated at a time: with fewer there is not a warp for each scheduler
MANY_COEFFICIENTS = 2**20
# rows of a warp, columns of an MMA
WARP_ROWS = 16
MMA_COLUMNS = 8


@dataclass(frozen=True)
class LinearLaunch:
    """How the fused linear kernel is launched.

    Args:
        columns: batch columns per block, a multiple of 8 up to 32; larger batches take several blocks, each of which decodes anew.
        blocks: thread blocks for each block of columns, which the weight's strips of 16 rows are dealt to;
            more of them where these would have more strips than they can.
        num_warps: warps per block, which share its strips: 1, 2, 4 or 8.
        registers: most registers per thread, or 0 for what the compiler likes.
    """

    columns: int
    blocks: int
    num_warps: int
    registers: int = 0

    def __post_init__(self) -> None:
        _check_columns(self.columns, 32)
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"num_warps must be 1, 2, 4 or 8, got {self.num_warps}")


@dataclass(frozen=True)
class RingLaunch:
    """How the kernel is launched that has activations in a ring of shared memory, for groups of four warps to multiply with (sm_90).

    Args:
        columns: batch columns per block, 8 or a multiple of 16; larger batches take several blocks, each of which decodes anew.
        splits: parts that the tiles of a row are cut into, for more blocks.
        num_warps: warps per block, each with 16 rows: 4 or 8.
        registers: most registers per thread, or 0 for what the compiler likes.
        cluster: parts meet in the shared memory of a cluster of blocks, which there are 1, 2, 4 or 8 of, else in global memory.
        fp8: products of e4m3 instead of int8. Up to 256 columns then, else 128.
        sharing: groups of four warps that share 64 rows, each with as much of the block's part of their tiles: 1, or 2 of 8 warps.
    """

    columns: int
    splits: int
    num_warps: int
    registers: int = 0
    cluster: bool = False
    fp8: bool = False
    sharing: int = 1

    def __post_init__(self) -> None:
        _check_columns(self.columns, 256 if self.fp8 else 128)
        if self.num_warps not in (4, 8) or (self.columns % 16 and self.columns != MMA_COLUMNS):
            raise ValueError(f"a ring takes 4 or 8 warps and 8 columns or a multiple of 16, got {self.num_warps} and {self.columns}")
        if self.splits < 1 or (self.cluster and self.splits not in CLUSTER_SHARE):
            raise ValueError(f"splits must be at least 1, and 1, 2, 4 or 8 for a cluster, got {self.splits}")
        if self.sharing not in (1, self.num_warps // 4) or (self.sharing > 1 and self.splits > 1 and not self.cluster):
            raise ValueError(f"sharing must be 1, or 2 of 8 warps and without splits that meet in global memory, got {self.sharing}")


def _check_columns(columns: int, most: int) -> None:
    if columns % MMA_COLUMNS or not MMA_COLUMNS <= columns <= most:
        raise ValueError(f"columns must be a multiple of {MMA_COLUMNS} from {MMA_COLUMNS} to {most}, got {columns}")


@dataclass(frozen=True)
class MatmulLaunch:
    """How the int8 product of decoded codes is launched: outputs per block, columns per step, warps, steps under way, parts of K."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    stages: int
    splits: int = 1


@dataclass(frozen=True)
class RowLaunch:
    """How rows are rotated at a time: tiles of a row, padded to a power of two, and the warps that have them in registers."""

    tiles: int
    num_warps: int


@functools.lru_cache(maxsize=32)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=32)
def _hopper_or_newer(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels on the device can start before the kernel before them ends (programmatic dependent launch)."""
    return _hopper_or_newer(device)


def warpgroup_products(device: torch.device) -> bool:
    """Whether tensor cores of the device take operands from shared memory, for four warps at a time."""
    return _hopper_or_newer(device)


@functools.lru_cache(maxsize=32)
def ring_products(device: torch.device) -> bool:
    """Whether groups of four warps multiply codes from registers with activations from shared memory (`wgmma`, sm_90 alone)."""
    return _hopper_or_newer(device) and torch.cuda.get_device_capability(device)[0] == 9


def fp8_products(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 with one scale per row (`torch._scaled_mm`)."""
    return _hopper_or_newer(device)


@functools.lru_cache(maxsize=32)
def block_scaled_products(device: torch.device) -> bool:
    """Whether the device multiplies 4-bit floats with a scale per block, and Triton compiles that: sm_100, 103 and 120, by all versions."""
    return _hopper_or_newer(device) and torch.cuda.get_device_capability(device) in ((10, 0), (10, 3), (12, 0))


def decode_warps(row_bytes: int) -> int:
    """Warps per block: shared memory holds 8 with short stream planes, 4 with long ones."""
    return 8 if row_bytes <= 64 else 4


def even_parts(tiles: int, parts: int) -> int:
    """The fewest parts, up to `parts`, whose largest is as small as with `parts`."""
    parts = max(1, min(tiles, parts))
    return -(-tiles // -(-tiles // parts))


@functools.lru_cache(maxsize=4096)
def matmul_launch(batch: int, rows: int, tiles: int, processors: int, warpgroups: bool) -> MatmulLaunch:
    """Launch of the int8 product; `warpgroups`: the device multiplies by groups of four warps, from shared memory (sm_90 and newer).

    Measured (H200, 2026-11-24): of eight block shapes this is the fastest for all batches from 128 up. Without warp groups operands are
    in registers too, and leave room for half as many sums.
    """
    block_n = 128 if warpgroups and batch > 64 else 64
    blocks = -(-batch // 64) * -(-rows // block_n)
    return MatmulLaunch(64, block_n, 128, 4, 4, even_parts(tiles, processors // blocks))


def fused_batch(device: torch.device) -> int:
    """Largest batch for which the fused kernel is the fastest on a device."""
    return RING_BATCH if ring_products(device) else FUSED_BATCH


@functools.lru_cache(maxsize=4096)
def linear_launch(batch: int, rows: int, tiles: int, processors: int, row_bytes: int, ring: bool) -> LinearLaunch | RingLaunch:
    """Launch for `[batch, K] x [rows, K]^T`, `tiles` tiles per row, `row_bytes` of `hq_inductor.ops.kernels.shared`; `ring`: may be one.

    As many blocks as multiprocessors hold, or several times as many where these would have more strips than they can. From 33 columns up
    the ring pays, but for small weights up to 64.
    """
    from .kernels.linear import most_strips  # Triton is there on Linux only

    if ring and batch > max(REGISTERS):
        launch, time = _ring_launch(batch, rows, tiles, processors, row_bytes, False)
        column_blocks = -(-batch // max(REGISTERS))
        if column_blocks > LINEAR_BLOCKS:
            return launch
        linear = linear_launch(batch, rows, tiles, processors, row_bytes, False)
        live = linear.blocks * column_blocks <= 2 * processors
        strips = -(-rows // (WARP_ROWS * linear.blocks))  # of a block
        turns = -(-strips * tiles // linear.num_warps)
        return linear if live and LINEAR_START + turns * LINEAR_TILE < time else launch
    columns = next((c for c in REGISTERS if batch <= c), max(REGISTERS))
    num_warps = decode_warps(row_bytes)
    slots = max(1, 2 * processors * (8 // num_warps) // -(-batch // columns))
    strips = -(-rows // WARP_ROWS)
    if columns == MMA_COLUMNS and num_warps == 8 and slots < strips <= slots * 3 // 2:
        # a strip for each of three blocks takes less than two for one of two
        return LinearLaunch(columns, strips, _working_warps(num_warps, tiles), TIGHT_REGISTERS)
    waves = -(-strips // (slots * most_strips(columns, num_warps, row_bytes)))
    blocks = max(1, min(strips, slots * waves))
    return LinearLaunch(columns, blocks, _working_warps(num_warps, -(-strips // blocks) * tiles), REGISTERS[columns])


def _working_warps(most: int, tiles: int) -> int:
    """Warps of a block with so many tiles: none without, but one alone takes too long to load the decoder's table."""
    return min(most, max(2, 1 << max(0, tiles - 1).bit_length()))


def _ring_launch(batch: int, rows: int, tiles: int, processors: int, row_bytes: int, fp8: bool) -> tuple[RingLaunch, float]:
    """The launch that takes the least time by what its tiles, starts and meetings take, and that."""
    kinds = FP8_KINDS if fp8 else RING_KINDS
    enough = min(kind.columns for kind in kinds if kind.columns >= min(batch, kinds[-1].columns))
    most_warps = decode_warps(row_bytes)
    options = []
    for kind in kinds:
        if enough <= kind.columns <= max(enough, SPARE_COLUMNS):
            options += _ring_options(kind, -(-batch // kind.columns), rows, tiles, processors, most_warps, fp8)
    return min(options, key=lambda option: option[1])


def _ring_options(
    kind: RingKind, column_blocks: int, rows: int, tiles: int, processors: int, most_warps: int, fp8: bool
) -> list[tuple[RingLaunch, float]]:
    """Launches of a kind, with the time that each takes."""
    columns, held = kind.columns, ring_warps(kind.registers)
    # small blocks find places more evenly
    num_warps = most_warps if columns <= 64 or columns == 256 else 4
    in_clusters = 4 if held == 16 else num_warps

    def panels(warps: int, sharing: int) -> int:
        return -(-rows * sharing // (WARP_ROWS * warps)) * column_blocks

    def time(launch: RingLaunch) -> float:
        blocks = panels(launch.num_warps, launch.sharing) * launch.splits
        slots = processors * max(1, held // launch.num_warps)
        rounds = -(-blocks // max(1, int(slots * (CLUSTER_SHARE[launch.splits] if launch.cluster else 1))))
        busy = min(1.0, launch.num_warps * -(-blocks // processors) / held)
        tile = (kind.shared if launch.sharing > 1 else kind.tile) * (1 - IDLE_SHARE * (1 - busy))
        meeting = CLUSTER_MEETING * launch.splits if launch.cluster else _up_to(MEMORY_MEETING, columns) if launch.splits > 1 else 0.0
        return rounds * (RING_START + -(-tiles // (launch.splits * launch.sharing)) * tile) + meeting

    def launch(splits: int, warps: int, cluster: bool = False, sharing: int = 1) -> RingLaunch:
        return RingLaunch(columns, splits, warps, kind.registers, cluster, fp8, sharing)

    options = []
    if kind.tile is not None:
        slots = processors * max(1, held // num_warps)
        options += [launch(1, num_warps), launch(even_parts(tiles, slots // panels(num_warps, 1)), num_warps)]
        options += [launch(parts, in_clusters, True) for parts in (2, 4, 8) if parts <= tiles]
    if most_warps == 8:
        options += [launch(parts, 8, parts > 1, 2) for parts in (1, 2) if 2 * parts <= tiles]
    return [(option, time(option)) for option in options]


def _up_to(values: dict[int, float], columns: int) -> float:
    return next(value for most, value in values.items() if columns <= most)


@functools.lru_cache(maxsize=4096)
def fp8_launch(batch: int, rows: int, tiles: int, processors: int, row_bytes: int) -> RingLaunch:
    """As `linear_launch`, for products of e4m3, which only the kernel with a ring has."""
    return _ring_launch(batch, rows, tiles, processors, row_bytes, True)[0]


def deal_blocks(rows: Sequence[int], blocks: int, most: int) -> list[int]:
    """Blocks of each of several weights with so many rows, of `blocks` in all: as many strips each as can be, and `most` at the most."""
    strips = [-(-n // WARP_ROWS) for n in rows]
    dealt = [max(min(n, 1), -(-n // most), min(n, n * blocks // sum(strips))) for n in strips]
    for _ in range(blocks - sum(dealt)):
        i = max(range(len(strips)), key=lambda i: strips[i] / max(1, dealt[i]))
        dealt[i] = min(strips[i], dealt[i] + 1)
    return dealt


def decode_launch_blocks(rows: int, tiles: int, num_warps: int, processors: int) -> int:
    """Blocks whose warps the decoder's tiles of 16 rows are dealt to: two for each multiprocessor, which holds as many by their registers.

    One of 8 warps would do alone. But where a rotation runs beside them, multiprocessors that it leaves first take two blocks, others none.
    """
    units = -(-rows // WARP_ROWS) * tiles
    return max(1, min(-(-units // num_warps), 2 * processors))


def row_launch(batch: int, tiles: int, block: int, parts: int) -> RowLaunch | None:
    """Launch for rows of activations, a program each, or None if they are too long.

    Args:
        block: coefficients that are transformed together.
        parts: blocks of a tile, padded to a power of two.
    """
    padded = 1 << (tiles - 1).bit_length()
    row = padded * parts * block
    num_warps = row // (32 * ROW_REGISTERS)
    if num_warps < 4 and batch * row < MANY_COEFFICIENTS:
        # a multiprocessor has four schedulers
        num_warps = min(4, 2 * row // (32 * ROW_REGISTERS))
    num_warps = max(1, min(num_warps, padded * parts))
    if num_warps > MAX_ROW_WARPS or row > 32 * ROW_REGISTERS * num_warps:
        return None
    return RowLaunch(padded, num_warps)


def many_coefficients(batch: int, features: int) -> bool:
    """Whether activations are so many that whole rows at a time keep a device busy; tile by tile they are more, and smaller, programs."""
    return batch > FUSED_BATCH and batch * features >= MANY_COEFFICIENTS


def ring_warps(registers: int) -> int:
    """Warps that a multiprocessor holds of a kernel with a ring whose threads have so many registers, 0 for what they like."""
    return 16 if 0 < registers <= DENSE_REGISTERS else 8
