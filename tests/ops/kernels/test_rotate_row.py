"""Which thread has which coefficients of a row at each turn of the transform."""

import pytest

pytest.importorskip("triton")

from hq_inductor.ops.kernels.rotate_row import STORE, is_due, layout_of, turns_of


@pytest.mark.parametrize("num_warps", [1, 4])
@pytest.mark.parametrize("blocks", [1, 2, 4, 16])
@pytest.mark.parametrize("block", [128, 256, 512, 1024])
def test_layouts(block, blocks, num_warps):
    shape = (blocks * num_warps, block, num_warps)
    turns = turns_of(*shape)
    width = block.bit_length() - 1
    # a butterfly for each bit, once
    assert [sum(is_due(bit, *shape, turn) for turn in range(turns)) for bit in range(width)] == [1] * width
    if blocks * block >= 2048:
        assert turns == 2
    for turn in (*range(turns), STORE.value):
        layout = layout_of(*shape, turn)
        bases = layout.reg_bases + layout.lane_bases + layout.warp_bases
        # every coefficient is in one place
        assert sorted(bases) == sorted(
            [[0, 1 << bit] for bit in range(width)] + [[1 << bit, 0] for bit in range(shape[0].bit_length() - 1)]
        )
        # warps do not exchange
        assert len(layout.lane_bases) == 5 and all(base[0] >= blocks for base in layout.warp_bases)
        due = [[0, 1 << bit] for bit in range(width) if turn >= 0 and is_due(bit, *shape, turn)]
        assert all(base in layout.reg_bases for base in due)
    # 16 bytes of bf16 to load, of e4m3 to store
    for turn, contiguous in ((0, 3), (STORE.value, 4)):
        count = min(contiguous, width + blocks.bit_length() - 6)
        assert layout_of(*shape, turn).reg_bases[:count] == [[0, 1 << bit] for bit in range(count)]
