"""Launches: what they promise of a multiprocessor's registers and shared memory, for every format and batch; tables of stored ones."""

import itertools
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from hq_inductor.format.layout import LATTICES
from hq_inductor.format.rates import weight_layout
from hq_inductor.ops import launch as launch_module
from hq_inductor.ops import launch_table
from hq_inductor.ops.fused import _default_launch, stages_tiles
from hq_inductor.ops.kernels.linear import most_strips
from hq_inductor.ops.kernels.ring_output import output_bytes
from hq_inductor.ops.kernels.shared import OVERRUN, SHARED_BYTES, TABLE_BYTES, buffer_bytes, row_bytes
from hq_inductor.ops.kernels.warpgroup import ring_shape
from hq_inductor.ops.launch import (
    CLUSTER_SHARE,
    DENSE_REGISTERS,
    FUSED_BATCH,
    MANY_COEFFICIENTS,
    RING_BATCH,
    ROW_REGISTERS,
    TIGHT_REGISTERS,
    LinearLaunch,
    RingLaunch,
    deal_blocks,
    decode_launch_blocks,
    decode_warps,
    even_parts,
    fp8_launch,
    linear_launch,
    many_coefficients,
    ring_warps,
    row_launch,
)
from hq_inductor.ops.launch_table import Shape, batch_class, read_table, stored_launch, table_name, use_launches, write_table

# of sm_90: 32-bit registers, and KiB of shared memory, of which every block takes one more
REGISTERS, SHARED_KB = 65536, 228
LAYOUTS = [
    weight_layout(features, bps, lattice).tile for features in (896, 4096) for lattice in LATTICES for bps in (2.0, 3.0, 4.0, 5.0, 6.0)
]


@pytest.mark.parametrize("rows", [200, 4096, 28672])
def test_rings_have_room(rows):
    for layout in LAYOUTS:
        for batch, fp8 in itertools.product((1, 33, 64, 65, 96, 97, 128, 129, RING_BATCH), (False, True)):
            if batch == 1 and not fp8:
                continue
            stream = row_bytes(layout.stream_words)
            launch = fp8_launch(batch, rows, 8, 132, stream) if fp8 else linear_launch(batch, rows, 8, 132, stream, True)
            if isinstance(launch, LinearLaunch):
                # of small weights two blocks of columns
                assert batch <= 64 and not fp8 and rows <= 4096
                continue
            assert launch.fp8 == fp8
            assert (batch <= launch.columns or launch.columns == 128) and 1 <= launch.splits <= 8
            blocks, sharing = ring_warps(launch.registers) // launch.num_warps, launch.sharing
            steps, stages, staged, kilobytes = ring_shape(
                launch.columns, launch.num_warps, blocks, layout.words, stream, stages_tiles(layout), launch.fp8, sharing
            )
            assert steps in (1, 2, 4) and 3 <= stages <= 4
            scales = 0 if fp8 else 8 * launch.columns
            warp = 2 * 16 * (4 * layout.words + 16) + scales if staged else buffer_bytes(stream)
            assert TABLE_BYTES.value + sharing * output_bytes(launch.columns, 16 * launch.num_warps // sharing) <= 1024 * kilobytes
            ring = 32 * steps * stages * launch.columns + 16 * stages
            assert TABLE_BYTES.value + launch.num_warps * warp + sharing * ring <= 1024 * kilobytes
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
                held = REGISTERS // (32 * launch.num_warps * launch.registers)
                slots = min(SHARED_KB * 1024 // SHARED_BYTES.value, held) * processors
                strips, column_blocks = -(-rows // 16), -(-batch // launch.columns)
                most = most_strips(launch.columns, launch.num_warps, stream)
                assert -(-strips // most) <= launch.blocks <= strips
                # all live at once, or as many several times
                assert launch.blocks * column_blocks <= max(column_blocks, slots) or launch.blocks % (slots // column_blocks) == 0
                # no warp has none, but one that loads tables; none has more than one, or many more than an equal share among all that can
                # live at once
                assert launch.num_warps <= max(2, 2 * -(-strips // launch.blocks) * tiles)
                waves = -(-launch.blocks * column_blocks // slots)
                turns = -(-strips // launch.blocks) * tiles / launch.num_warps * waves
                share = strips * tiles * column_blocks / (launch.num_warps * slots)
                assert turns <= waves or turns < share + (waves + 1) * tiles / launch.num_warps
                taken = launch.num_warps * (buffer_bytes(stream) or 64 * launch.columns) + 64 * launch.columns * (most - 1)
                assert TABLE_BYTES.value + taken <= SHARED_BYTES.value


def test_blocks_of_a_weight():
    """For the weights of Llama 3: two blocks per multiprocessor, or three with one strip each instead of two with one or two."""

    def dealt(rows, columns, batch=1):
        launch = linear_launch(batch, rows, columns // 512, 132, 64, True)
        return launch.blocks, launch.registers

    assert dealt(4096, 4096) == (256, 128)
    assert dealt(6144, 4096) == (384, TIGHT_REGISTERS) and dealt(6144, 4096, 9) == (264, 128)
    assert dealt(14336, 4096) == dealt(28672, 8192) == (264, 128)
    # more strips than two blocks per multiprocessor can have
    assert dealt(128256, 4096) == (1056, 128)


def test_warps_of_the_decoder():
    """No block without work, and two on each multiprocessor however many warps a block has."""
    for num_warps in (4, 8):
        for rows, tiles in ((1, 1), (130, 8), (4096, 8), (28672, 56)):
            blocks, units = decode_launch_blocks(rows, tiles, num_warps, 132), -(-rows // 16) * tiles
            assert 1 <= blocks <= min(-(-units // num_warps), 2 * 132)
            assert blocks == 2 * 132 or blocks * num_warps >= units


def test_warps_have_tiles():
    """Small layers have fewer warps per block, each of which has a tile; one warp alone takes too long to load the table."""
    warps = [linear_launch(1, 256, tiles, 132, 64, True).num_warps for tiles in (1, 2, 3, 4, 5, 8, 28)]
    assert warps == [2, 2, 4, 4, 8, 8, 8]
    assert linear_launch(1, 28672, 1, 132, 64, True) == LinearLaunch(8, 264, 8, 128)


@pytest.mark.parametrize("rows", [(4096, 1024, 1024), (5,), (16, 0, 40), (28672, 16), (100, 100, 100, 20000)])
def test_blocks_of_siblings(rows):
    strips = [-(-n // 16) for n in rows]
    for blocks in (1, 7, 264, 396):
        dealt = deal_blocks(rows, min(blocks, sum(strips)), 8)
        assert all(-(-n // 8) <= b <= n and (b > 0) == (n > 0) for n, b in zip(strips, dealt, strict=True))
        # no more than asked for but where some have more strips than they can, and none has many more than another
        least = sum(max(min(n, 1), -(-n // 8)) for n in strips)
        assert sum(dealt) <= max(min(blocks, sum(strips)), least + len(rows))
        if blocks == 264:
            assert max(n / b for n, b in zip(strips, dealt, strict=True) if b) <= max(1, min(8, 1.25 * sum(strips) / blocks + 1))


def test_no_room_for_a_ring():
    with pytest.raises(ValueError, match="columns must be fewer for 2 blocks of 8 warps"):
        ring_shape(1024, 8, 2, 64, 64, True, False)


def test_stray_decoders_stay_in_shared_memory():
    """Lanes that corrupt words lead astray read up to OVERRUN bytes past the last buffer, where a kernel declares what it may at most."""
    for layout in LAYOUTS:
        stream = row_bytes(layout.stream_words)
        vectors = layout.tile // 32  # of a lane
        assert vectors * 31 // 8 + 12 <= OVERRUN <= TABLE_BYTES.value
        assert TABLE_BYTES.value + decode_warps(stream) * buffer_bytes(stream) + OVERRUN <= SHARED_BYTES.value


def test_parts_of_a_ring():
    """Clusters where they find room together, global memory where they do not, groups of warps that share rows where blocks are few."""

    def parts(rows, columns, batch=64):
        launch = linear_launch(batch, rows, columns // 512, 132, 64, True)
        return launch.splits, launch.cluster, launch.sharing

    assert linear_launch(64, 1024, 8, 132, 64, True) == LinearLaunch(32, 64, 8, 128)
    assert parts(4096, 4096) == parts(4096, 14336) == parts(4096, 4096, 128) == (2, True, 2)
    assert parts(6144, 4096) == (4, True, 1)
    assert parts(14336, 4096) == (2, True, 1)
    assert parts(6144, 4096, 128) == (1, False, 2)
    # two blocks of columns are work for all multiprocessors
    assert parts(4096, 14336, 256) == (2, True, 1)
    assert parts(28672, 8192) == parts(14336, 4096, 128) == (1, False, 1)


def test_registers_of_a_ring():
    """Sixteen warps on a multiprocessor where there is work for all, eight with all the registers they like where there is not; blocks of
    32 columns rather than 16 for e4m3 then."""

    def registers(rows, columns, batch=64):
        return linear_launch(batch, rows, columns // 512, 132, 64, True).registers

    assert registers(14336, 4096) == registers(28672, 8192) == registers(6144, 4096) == DENSE_REGISTERS
    assert registers(4096, 4096) == registers(4096, 14336) == registers(8192, 28672) == registers(14336, 4096, 128) == 0
    assert fp8_launch(8, 4096, 8, 132, 64).columns == 32
    assert fp8_launch(8, 28672, 8, 132, 64).columns == 16


def test_launches_of_a_ring_fit():
    for tiles, rows, processors, batch in itertools.product((1, 2, 7, 28), (16, 200, 4096), (1, 16, 132), (33, 100, 256)):
        launch = linear_launch(batch, rows, tiles, processors, 64, True)
        if isinstance(launch, LinearLaunch):
            assert batch == 33 and launch.blocks <= processors
            continue
        assert 1 <= launch.splits * launch.sharing <= tiles and (not launch.cluster or launch.splits in CLUSTER_SHARE)


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
        ((RingLaunch, 64, 3, 4, 0, True), "1, 2, 4 or 8 for a cluster, got 3"),
        ((RingLaunch, 256, 1, 8), "columns must be a multiple of 8 from 8 to 128, got 256"),
        ((LinearLaunch, 12, 1, 8), "columns must be a multiple of 8"),
        ((LinearLaunch, 8, 0, 8), "blocks must be at least 1"),
        ((LinearLaunch, 64, 1, 8), "columns must be a multiple of 8 from 8 to 32, got 64"),
        ((LinearLaunch, 8, 1, 3), "num_warps must be 1, 2, 4 or 8"),
        ((RingLaunch, 64, 1, 4, 0, False, False, 2), "sharing must be 1, or 2 of 8 warps"),
        ((RingLaunch, 64, 2, 8, 0, False, False, 2), "without splits that meet in global memory, got 2"),
    ],
)
def test_launches_are_checked(arguments, message):
    launch, *arguments = arguments
    with pytest.raises(ValueError, match=message):
        launch(*arguments)


# multiprocessors of GPUs that a table is stored for; all of them have the kernel with a ring
PROCESSORS = {"NVIDIA H100 80GB HBM3": 132}
CUDA = torch.device("cuda", 0)
ABOUT = dict.fromkeys(launch_table.ABOUT, "")
SHAPE = Shape(8, 640, 7, 64)
LINEAR, RING = LinearLaunch(8, 11, 8, 96), RingLaunch(64, 4, 8, 128, True)
FIELDS = {"columns": 64, "splits": 4, "num_warps": 8, "registers": 128, "cluster": True, "sharing": 1}
ENTRIES = {SHAPE._replace(batch=64): (RING, 1.5), SHAPE: (LINEAR, 1.0312)}


@pytest.fixture
def device(monkeypatch):
    """A make-believe H100, to be changed, which nothing is remembered of."""
    device = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device.capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    remembered = [f for module in (launch_module, launch_table) for f in vars(module).values() if hasattr(f, "cache_clear")]
    for function in remembered:
        function.cache_clear()
    yield device
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def table(device, tmp_path):
    """A file that is taken in place of the stored one, with `ENTRIES`."""
    path = tmp_path / "launches.json"
    write_table(path, ABOUT, ENTRIES)
    use_launches(path)
    yield path
    use_launches(None)


def chosen(batch, rows, tiles):
    """What the fused linear layer takes for a weight of E8 at 4 bits, asked with fake tensors as `compile_ahead` does."""
    with FakeTensorMode():
        x = torch.empty(batch, tiles * 512, device="cuda")
    return _default_launch(x, [rows - 16, 16], tiles, weight_layout(512, 4.0, "e8").tile)


@pytest.mark.parametrize("path", sorted(launch_table.DIRECTORY.glob("*.json")), ids=lambda path: path.stem)
def test_stored_launches_fit_and_differ_from_the_rules(path):
    text = json.loads(path.read_text())
    assert path.name == table_name(text["device"]) and all(entry["gain"] > 1.02 for entry in text["entries"])
    launches = read_table(path, True)
    assert list(launches) == sorted(launches) and path.read_text().count("\n    {") == len(launches)
    for shape, launch in launches.items():
        assert launch != linear_launch(*shape[:3], PROCESSORS[text["device"]], shape.row_bytes, True)
        assert 32 * launch.num_warps * launch.registers <= REGISTERS


def test_stored_launches_are_found(device):
    (shape, launch), *_ = read_table(launch_table.DIRECTORY / table_name(device.name), True).items()
    assert chosen(shape.batch - 1, shape.rows, shape.tiles) == chosen(shape.batch, shape.rows, shape.tiles) == launch
    assert stored_launch(*shape, CUDA) == launch
    for other in (shape._replace(rows=shape.rows + 16), shape._replace(tiles=shape.tiles + 1), shape._replace(row_bytes=128)):
        assert stored_launch(*other, CUDA) is None
    rows = shape.rows + 16
    assert chosen(1, rows, shape.tiles) == linear_launch(1, rows, shape.tiles, 132, 64, True)


def test_no_table_is_no_matter(device):
    device.name = "NVIDIA A100-SXM4-80GB"
    assert table_name(device.name) == "nvidia_a100_sxm4_80gb.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stored_launch(1, 8192, 56, 64, CUDA) is None


def test_batch_classes():
    assert [batch_class(batch, True) for batch in (1, 8, 9, 32, 33, 64, 96, 97, 128, 129)] == [8, 8, 16, 32, 64, 64, 96, 128, 128, None]
    assert [batch_class(batch, False) for batch in (32, 33)] == [32, None]


def test_launches_of_a_file(table):
    assert read_table(table, True) == {shape: launch for shape, (launch, _) in ENTRIES.items()}
    assert json.loads(table.read_text())["entries"][0] == {**SHAPE._asdict(), "linear": vars(LINEAR), "gain": 1.031}
    assert chosen(5, 640, 7) == LINEAR and chosen(40, 640, 7) == RING
    # not beside the stored one
    assert stored_launch(1, 8192, 56, 64, CUDA) is None
    # and not read again
    table.unlink()
    assert chosen(6, 640, 7) == LINEAR


def test_what_is_no_table_is_not_used(table, tmp_path):
    damaged = tmp_path / "damaged.json"
    damaged.write_text("[]")
    with pytest.raises(ValueError, match="it must be a JSON object of format 1"):
        use_launches(damaged)
    with pytest.raises(OSError, match=r"missing\.json"):
        use_launches(tmp_path / "missing.json")
    assert chosen(5, 640, 7) == LINEAR
    use_launches(None)
    assert chosen(5, 640, 7) == linear_launch(5, 640, 7, 132, 64, True)


def entry(kind="linear", gain=1.1, launch=LINEAR, **fields):
    stored = {name: value for name, value in vars(launch).items() if name != "fp8"}
    fields = {**SHAPE._asdict(), kind: stored, "gain": gain, **fields}
    return json.dumps({"format": 1, **ABOUT, "entries": [{name: value for name, value in fields.items() if value is not None}]})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "a JSON object of format 1"),
        ('{"format": 2}', "a JSON object of format 1"),
        ('{"format": 1}', "the file must have the fields format, device"),
        (json.dumps({"format": 1, **ABOUT, "entries": {}}), "entries must be a list"),
        (json.dumps({"format": 1, **ABOUT, "entries": [1]}), "entry 1: it must be an object"),
        (entry(stages=3), "it must have the fields batch, rows, tiles, row_bytes, linear, gain, got"),
        (entry(rows=None), "it must have the fields"),
        (entry(rows="640"), "rows must be an integer, got '640'"),
        (entry(batch=12), "there is no such Shape.batch=12"),
        (entry(gain="much"), "gain must be a number, got 'much'"),
        (entry(linear=[8]), "linear must be an object"),
        (entry(linear={**vars(LINEAR), "stages": 3}), "linear must have the fields columns, blocks, num_warps, registers, got"),
        (entry(linear={**vars(LINEAR), "blocks": True}), "blocks must be an integer, got True"),
        (entry(linear={**vars(LINEAR), "blocks": 4}), "blocks must be from 5 to 40 for 640 rows, got 4"),
        (entry(launch=LinearLaunch(8, 41, 8)), "blocks must be from 5 to 40 for 640 rows, got 41"),
        (entry(linear={**vars(LINEAR), "num_warps": 3}), "num_warps must be 1, 2, 4 or 8, got 3"),
        (entry(row_bytes=128), "num_warps must be at most 4 for row_bytes 128, got 8"),
        (entry(launch=LinearLaunch(8, 11, 8, 256)), "registers must be 0 or from 32 to 255, got 256"),
        (entry("ring", launch=RingLaunch(64, 8, 8)), "splits times sharing must be at most the 7 tiles, got 8"),
        (entry("ring", launch=RingLaunch(64, 4, 8, 0, True, False, 2)), "splits times sharing must be at most the 7 tiles, got 8"),
        (entry("ring", ring={**FIELDS, "cluster": 1}), "cluster must be true or false, got 1"),
        (entry("ring", launch=RingLaunch(64, 1, 8), row_bytes=128), "num_warps must be at most 4"),
        (entry().replace("[{", "[{}, {"), "entry {}: it must have the fields"),
        (entry().replace("]", entry().partition("[")[2].replace("{", ", {", 1).partition("]")[0] + "]"), "it is there twice"),
    ],
)
def test_damaged_tables_warn_once_and_leave_it_to_the_rules(table, text, reason):
    table.unlink()
    if text is not None:
        table.write_text(text)
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        assert [chosen(batch, 640, 7) for batch in (1, 64)] == [linear_launch(batch, 640, 7, 132, 64, True) for batch in (1, 64)]
    assert len(caught) == 1 and str(table) in str(caught[0].message)


def test_rings_where_there_are_none(device, table):
    device.capability = (8, 0)
    with pytest.warns(RuntimeWarning, match="the device has no kernel with a ring"):
        assert chosen(1, 640, 7) == linear_launch(1, 640, 7, 132, 64, False)


@pytest.mark.parametrize("batch", [1, 64, 4096])
@pytest.mark.parametrize(("block", "parts"), [(128, 1), (128, 4), (512, 1), (512, 4), (128, 16)])
def test_rows_fit_registers(batch, block, parts):
    """Whole blocks for every warp, a row in the registers of all; longer rows have no launch."""
    longest = 16 * 32 * ROW_REGISTERS // (block * parts)
    for tiles in range(1, longest + 1):
        launch = row_launch(batch, tiles, block, parts)
        assert launch.tiles in range(tiles, 2 * tiles) and launch.tiles.bit_count() == 1
        assert launch.tiles * parts % launch.num_warps == 0
        assert launch.tiles * parts * block <= launch.num_warps * 32 * ROW_REGISTERS
    assert row_launch(batch, longest + 1, block, parts) is None


def test_small_batches_are_rotated_tile_by_tile():
    assert not many_coefficients(FUSED_BATCH, MANY_COEFFICIENTS)
    assert many_coefficients(FUSED_BATCH + 1, MANY_COEFFICIENTS) and not many_coefficients(FUSED_BATCH + 1, 128)
