"""Launches of the KV cache's kernels, as far as a machine without a GPU can tell."""

import pytest
import torch

pytest.importorskip("triton")

from hq_inductor.format.kv import kv_layout
from hq_inductor.ops.fused_kv import attention_launch, store, unsupported


@pytest.mark.parametrize("units", [1, 8, 24, 64, 100, 192, 256, 500, 4096])
@pytest.mark.parametrize("max_tokens", [64, 1024, 32768])
def test_launch_fills_the_device(units, max_tokens):
    """No other number of programs per head would leave the device with less to do, the same fixed part per wave counted."""
    layout = kv_layout(128, 4.0).tile
    launch = attention_launch(units, max_tokens, 132, layout, layout)
    waves = -(-units * launch.splits // 264)
    assert launch.num_warps == 8 and 1 <= launch.splits <= max_tokens // 128 + 2
    if max_tokens == 32768:
        # at least 7 of 8 slots of the waves that it takes have a program
        assert units < 5 or units * launch.splits >= 0.87 * 264 * waves
    if units >= 264:
        assert waves * 264 <= 1.3 * units * launch.splits


def arguments(head_dim=128, bps=4.0, queries=1, group=4, max_tokens=64, exact=torch.bfloat16, dtype=torch.bfloat16, pages=0):
    layout = kv_layout(head_dim, bps).tile
    join = layout.tile // head_dim
    query = torch.zeros(1, 2 * join * group, queries, head_dim, dtype=dtype)
    words = torch.zeros(1, 2, max_tokens, layout.words, dtype=torch.int32)
    page_table = torch.zeros(1, pages, dtype=torch.int32) if pages else None
    return query, words, torch.zeros(1, 2 * join, 8, head_dim, dtype=exact), None, layout, layout, page_table


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"head_dim": 64}, None),
        ({"head_dim": 256}, None),
        ({"dtype": torch.float32}, None),
        ({"head_dim": 80}, None),
        ({"head_dim": 96}, None),
        ({"head_dim": 320}, "320"),
        ({"queries": 9}, "9 queries"),
        ({"bps": 3.5, "max_tokens": 65}, "65 tokens"),
        ({"exact": torch.float32}, "float32"),
        ({"dtype": torch.float64}, "float64"),
        ({"pages": 3, "max_tokens": 16}, None),
        ({"pages": 3, "max_tokens": 8}, "page_size must be a power of two of at least 16, got 8"),
        ({"pages": 3, "max_tokens": 48}, "page_size must be a power of two of at least 16, got 48"),
    ],
)
def test_what_the_kernel_refuses(changes, reason):
    found = unsupported(*arguments(**changes))
    assert found is None if reason is None else reason in found


def test_store_refuses():
    layout = kv_layout(128, 4.0).tile
    words, x, position = torch.zeros(1, 2, 8, layout.words, dtype=torch.int32), torch.zeros(1, 2, 1, 128), torch.zeros(1, dtype=torch.int64)
    for bad_words, bad_x, effort in ((words, x, 2), (words[..., 1:], x, 1), (words, x[:, :1], 1), (words, x[..., :100], 1)):
        with pytest.raises(ValueError, match=r"effort|cannot hold"):
            store(bad_words, bad_x, position, layout, effort)
    for other in ((words, x.half()), (words, x[:, :1]), (words[:, :, 1:], x)):
        with pytest.raises(ValueError, match="other must be like words"):
            store(words, x, position, layout, other=other)
    assert (words == 0).all()
