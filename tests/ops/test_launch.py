"""Launches: what they promise of a multiprocessor's registers and shared memory, for every format and batch."""

import pytest

pytest.importorskip("triton")

from hq_inductor.format.layout import LATTICES
from hq_inductor.format.rates import weight_layout
from hq_inductor.ops.fused import stages_tiles
from hq_inductor.ops.kernels.linear import sums_bytes
from hq_inductor.ops.kernels.shared import OVERRUN, SHARED_BYTES, TABLE_BYTES, buffer_bytes, row_bytes
from hq_inductor.ops.kernels.warpgroup import ring_shape
from hq_inductor.ops.launch import (
    RING_BATCH,
    TIGHT_REGISTERS,
    LinearLaunch,
    RingLaunch,
    decode_warps,
    even_parts,
    linear_launch,
    ring_warps,
)

# of sm_90: 32-bit registers, and KiB of shared memory, of which every block takes one more
REGISTERS, SHARED_KB = 65536, 228
LAYOUTS = [
    weight_layout(features, bps, lattice).tile for features in (896, 4096) for lattice in LATTICES for bps in (2.0, 3.0, 4.0, 5.0, 6.0)
]


@pytest.mark.parametrize("rows", [200, 4096, 28672])
def test_rings_have_room(rows):
    for layout in LAYOUTS:
        for batch in (33, 64, 65, 96, 97, 128, 129, RING_BATCH):
            stream = row_bytes(layout.stream_words)
            launch = linear_launch(batch, rows, 8, 132, stream, True)
            assert isinstance(launch, RingLaunch) and (batch <= launch.columns or launch.columns == 128) and 1 <= launch.splits <= 8
            blocks = ring_warps(launch.columns) // launch.num_warps
            steps, stages, staged, kilobytes = ring_shape(
                launch.columns, launch.num_warps, blocks, layout.words, stream, stages_tiles(layout)
            )
            assert steps in (1, 2, 4) and 3 <= stages <= 4
            warp = 2 * 16 * (4 * layout.words + 16) + 8 * launch.columns if staged else buffer_bytes(stream)
            assert TABLE_BYTES.value + launch.num_warps * warp + 32 * steps * stages * launch.columns + 16 * stages <= 1024 * kilobytes
            assert blocks * (kilobytes + 1) <= SHARED_KB
            assert blocks * launch.num_warps * 32 * launch.registers <= REGISTERS


@pytest.mark.parametrize("processors", [16, 108, 132])
@pytest.mark.parametrize("rows", [1, 200, 4096, 6144, 28672])
def test_blocks_live_at_once_and_share_the_work(rows, processors):
    for layout in LAYOUTS:
        stream = row_bytes(layout.stream_words)
        for tiles in (1, 2, 7, 8, 16, 28, 56):
            for batch in (1, 8, 9, 16, 32, 33, 70):
                launch = linear_launch(batch, rows, tiles, processors, stream, False)
                panels = -(-rows // launch.panel_rows)
                slots = SHARED_KB * 1024 // SHARED_BYTES.value * processors
                held = REGISTERS // (32 * launch.num_warps * launch.registers)
                waves = launch.registers == TIGHT_REGISTERS and launch.blocks == panels
                column_blocks = -(-batch // launch.columns)
                assert waves or launch.blocks * column_blocks <= max(column_blocks, min(slots, held * processors))
                assert launch.sharing == 0 or launch.blocks == panels
                # no warp has many more tiles to decode than an equal share among all that can live at once
                turns = -(-panels * tiles // launch.blocks) if launch.sharing == 0 else -(-tiles // launch.sharing)
                share = -(-rows // 16) * tiles * column_blocks / (16 * processors)
                assert waves or turns < 1.25 * max(share, tiles / launch.num_warps) + 2
                taken = launch.num_warps * buffer_bytes(stream) + sums_bytes(launch.columns, launch.num_warps)
                assert TABLE_BYTES.value + taken <= SHARED_BYTES.value


def test_waves_and_runs():
    """The three ways of dealing, for the weights of Llama 3."""

    def dealt(rows, columns):
        launch = linear_launch(1, rows, columns // 512, 132, 64, True)
        return launch.sharing, launch.blocks, launch.registers

    assert dealt(4096, 4096) == (8, 256, 128)
    assert dealt(6144, 4096) == (8, 384, TIGHT_REGISTERS)
    assert dealt(8192, 8192) == (4, 256, 128)
    assert dealt(28672, 4096) == (0, 264, 128)
    assert dealt(28672, 8192) == (4, 896, TIGHT_REGISTERS)


def test_no_room_for_a_ring():
    with pytest.raises(ValueError, match="columns must be fewer for 2 blocks of 8 warps"):
        ring_shape(1024, 8, 2, 64, 64, True)


def test_stray_decoders_stay_in_shared_memory():
    """Lanes that corrupt words lead astray read up to OVERRUN bytes past the last buffer, where a kernel declares what it may at most."""
    for layout in LAYOUTS:
        stream = row_bytes(layout.stream_words)
        vectors = layout.tile // 32  # of a lane
        assert vectors * 31 // 8 + 8 <= OVERRUN <= TABLE_BYTES.value
        assert TABLE_BYTES.value + decode_warps(stream) * buffer_bytes(stream) + OVERRUN <= SHARED_BYTES.value


def test_parts_are_even():
    for tiles in range(1, 40):
        for parts in range(1, 50):
            found = even_parts(tiles, parts)
            assert 1 <= found <= min(tiles, parts) and -(-tiles // found) == -(-tiles // min(tiles, parts))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((RingLaunch, 8, 1, 2), "a ring takes 4 or 8 warps"),
        ((RingLaunch, 24, 1, 4), "multiple of 16, got 4 and 24"),
        ((RingLaunch, 64, 0, 4), "splits must be at least 1"),
        ((LinearLaunch, 12, 1, 8), "columns must be a multiple of 8"),
        ((LinearLaunch, 8, 0, 8), "blocks must be at least 1"),
        ((LinearLaunch, 8, 1, 3), "num_warps must be 1, 2, 4 or 8"),
        ((LinearLaunch, 8, 1, 4, 3), "sharing must be 0 or divide 4 warps, got 3"),
    ],
)
def test_launches_are_checked(arguments, message):
    launch, *arguments = arguments
    with pytest.raises(ValueError, match=message):
        launch(*arguments)
