"""Paged caches against contiguous ones, row by row: the same slots, wherever they lie."""

import pytest
import torch
from torch.library import opcheck

import hq_inductor  # noqa: F401  (registers the ops)
from hq_inductor.format.kv import exact_index, kv_layout
from hq_inductor.ops.kv import scatter_rows

OPS = torch.ops.hyperquant
PAGE, MAX_PAGES, NUM_PAGES = 4, 3, 9
TOKENS = PAGE * MAX_PAGES
# in no order; one page is in no row
TABLE = torch.tensor([[5, 0, 7], [2, 8, 1], [6, 3, 4]], dtype=torch.int32)[:, [2, 0, 1]].contiguous()
NO_PAGES = (-1, NUM_PAGES, 2**31 - 1, -(2**31))


def key(layout):
    return layout.tile.lattice, layout.tile.tile, layout.tile.code


def make(head_dim=64, kv_heads=3, lattice="e8", batch=2):
    """A layout, a pool inside of a larger buffer, and an empty contiguous cache."""
    layout = kv_layout(head_dim, 3, lattice)
    slots, words = layout.slots(kv_heads), layout.tile.words
    buffer = torch.full((NUM_PAGES + 2, slots, PAGE, words), 77, dtype=torch.int32)
    return layout, buffer, buffer[1:-1], torch.full((batch, slots, TOKENS, words), 77, dtype=torch.int32)


def in_order(pool, table):
    """A contiguous cache of a pool's slots, the pages of each row one after the other."""
    return torch.stack([torch.cat([pool[page] for page in row], 1) for row in table.tolist()])


@pytest.mark.parametrize(("head_dim", "lattice", "dither"), [(64, "e8", None), (128, "d4", None), (80, "e8", "full")])
def test_store_and_load_are_those_of_each_row(head_dim, lattice, dither):
    layout, buffer, pool, words = make(head_dim, lattice=lattice)
    x = torch.randn(2, 3, 5, head_dim)
    position = torch.tensor([[11, -1, 3, 4, 12], [0, 7, 2**40, 8, 1]])
    OPS.kv_store(pool, x, position, *key(layout), 0, dither, 5, TABLE[:2])
    rows = [OPS.kv_store(words[b : b + 1], x[b : b + 1], position[b], *key(layout), 0, dither, 5) for b in range(2)]
    assert rows == [None, None] and (words != 77).any()
    assert torch.equal(in_order(pool, TABLE[:2]), words)
    assert (buffer[[0, -1]] == 77).all() and (in_order(pool, TABLE[2:]) == 77).all()
    of_all_rows = make(head_dim, lattice=lattice)[3]
    OPS.kv_store(of_all_rows, x, position, *key(layout), 0, dither, 5)
    assert torch.equal(of_all_rows, words)
    found = OPS.kv_load(pool, head_dim, *key(layout), torch.float32, dither, 5, TABLE[:2])
    assert torch.equal(found, OPS.kv_load(words, head_dim, *key(layout), torch.float32, dither, 5))


def test_a_pair_is_keys_and_values_stored():
    layout, keys, k_pool, _ = make()
    _, values, v_pool, _ = make()
    x, position = torch.randn(2, 2, 3, 2, 64), torch.tensor([[11, 3], [0, 7]])
    OPS.kv_store_pair(k_pool, v_pool, *x, position, *key(layout), layout.tile.code, 0, None, 0, 0, TABLE[:2])
    for side, buffer in zip(x, (keys, values), strict=True):
        _, alone, pool, _ = make()
        OPS.kv_store(pool, side, position, *key(layout), 0, None, 0, TABLE[:2])
        assert torch.equal(buffer, alone) and (alone != 77).any()


@pytest.mark.parametrize("entry", NO_PAGES)
def test_nothing_is_stored_without_a_page(entry):
    layout, buffer, pool, _ = make()
    table = TABLE[:2].clone()
    table[0, 1] = entry
    x = torch.randn(2, 3, 1, 64)
    OPS.kv_store(pool, x, torch.tensor([[PAGE], [0]]), *key(layout), 0, None, 0, table)
    written = (buffer != 77).flatten(1).any(1).nonzero().flatten().tolist()
    assert written == [1 + int(table[1, 0])]
    loaded = OPS.kv_load(pool, 64, *key(layout), torch.float32, None, 0, table)
    assert (loaded[0, :, PAGE : 2 * PAGE] == 0).all() and loaded[1].isfinite().all()
    before = buffer.clone()
    OPS.kv_store(pool, x, torch.tensor([PAGE]), *key(layout), 0, None, 0, table.fill_(entry))
    assert torch.equal(buffer, before)


def filled(head_dim, kv_heads, lengths, sinks, window):
    """Layout, pool, contiguous words and exact buffers of rows of different length."""
    layout, _, pool, words = make(head_dim, kv_heads, batch=len(lengths))
    exact = torch.full((len(lengths), kv_heads, sinks + window, head_dim), 1e4)
    table = TABLE[: len(lengths)]
    for b, length in enumerate(lengths):
        x, position = torch.randn(1, kv_heads, length, head_dim), torch.arange(length)
        OPS.kv_store(words[b : b + 1], x, position, *key(layout), 0)
        OPS.kv_store(pool, x, position, *key(layout), 0, None, 0, table[b : b + 1])
        kept = (position < sinks) | (position >= length - window)
        exact[b][:, exact_index(position[kept], sinks, window)] = x[0, :, kept]
    return layout, pool, words, exact


@pytest.mark.parametrize(("head_dim", "queries", "sinks", "window"), [(128, 1, 2, 3), (64, 3, 0, 2), (80, 1, 0, 0)])
@pytest.mark.parametrize("case", ["causal", "start", "sliding", "mask"])
def test_attention_is_that_of_each_row(head_dim, queries, sinks, window, case):
    lengths = torch.tensor([12, 3, 7])
    layout, pool, words, exact = filled(head_dim, 2, lengths.tolist(), sinks, window)
    query = torch.randn(3, 4, queries, head_dim)
    start = torch.tensor([3, 0, 6]) if case == "start" else None
    mask = torch.rand(3, 1, queries, TOKENS) < 0.6 if case == "mask" else None
    tail = (0.1, sinks, window, 4 if case == "sliding" else 0, *key(layout), layout.tile.code)

    def attend(rows, words, length, page_table=None):
        arguments = (query[rows], words, words, exact[rows], exact[rows], length, *(x if x is None else x[rows] for x in (start, mask)))
        return OPS.kv_attention(*arguments, *tail, page_table=page_table)

    expected = torch.cat([attend([b], words[b : b + 1], lengths[b : b + 1]) for b in range(3)])
    rows = [0, 1, 2]
    assert torch.allclose(attend(rows, words, lengths), expected, atol=1e-5)
    assert torch.allclose(attend(rows, pool, lengths, TABLE), expected, atol=1e-5)
    # one length for all: the paged form is the other one exactly
    assert torch.equal(attend(rows, pool, lengths[:1], TABLE), attend(rows, words, lengths[:1]))


@pytest.mark.parametrize("entry", NO_PAGES)
def test_what_has_no_page_is_not_seen(entry):
    sinks, window = 2, 3
    layout, pool, words, exact = filled(128, 2, [12, 9], sinks, window)
    table, query = TABLE[:2].clone(), torch.randn(2, 4, 1, 128)
    table[0, 0] = table[1, 2] = entry
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    # sinks, and in the second row the window, are exact
    mask[0, ..., sinks:PAGE] = False
    tail = (0.1, sinks, window, 0, *key(layout), layout.tile.code)
    found = OPS.kv_attention(query, pool, pool, exact, exact, torch.tensor([12, 9]), None, None, *tail, page_table=table)
    expected = OPS.kv_attention(query, words, words, exact, exact, torch.tensor([12, 9]), None, mask, *tail)
    assert torch.allclose(found, expected, atol=1e-5)
    nothing = OPS.kv_attention(
        query,
        pool,
        pool,
        exact[:, :, :0],
        exact[:, :, :0],
        torch.tensor([12]),
        None,
        None,
        0.1,
        0,
        0,
        *tail[3:],
        page_table=table.fill_(entry),
    )
    assert (nothing == 0).all()


def test_rows_are_scattered_where_they_may():
    target, rows = torch.zeros(3, 2, 4, 5), torch.randn(2, 2, 3, 5)
    block, place = torch.tensor([[2, 0, -1], [3, 1, 2]]), torch.tensor([[3, 0, 0], [0, 4, 0]])
    expected = target.clone()
    expected[2, :, 3], expected[0, :, 0], expected[2, :, 0] = rows[0, :, 0], rows[0, :, 1], rows[1, :, 2]
    scatter_rows(target, block, place, rows)
    assert torch.equal(target, expected)
    scatter_rows(target, block - 4, place, rows + 1)
    assert torch.equal(target, expected)
    # on the meta device a read of a value raises
    scatter_rows(*(x.to("meta") for x in (target, block, place, rows)))


def samples():
    layout, pool, _, exact = filled(64, 3, [9, 5], 1, 2)
    table, lengths = TABLE[:2], torch.tensor([9, 5])
    x = torch.randn(2, 4, 3, 64).transpose(1, 2)[:, :, :3]
    position = lengths[:, None] + torch.arange(3)
    yield OPS.kv_store.default, (pool.clone(), x, position, *key(layout), 1, None, 0, table)
    yield OPS.kv_store.default, (pool.clone(), x, position[0], *key(layout), 0, "half", 3, table)
    pair = (pool.clone(), pool.clone(), x, x + 1, position, *key(layout), layout.tile.code, 0)
    yield OPS.kv_store_pair.default, (*pair, None, 0, 0, table)
    yield OPS.kv_load.default, (pool, 64, *key(layout), torch.bfloat16, None, 0, table)
    query = torch.randn(2, 1, 6, 64).transpose(1, 2)
    head = (query, pool, pool, exact, exact, lengths, None, None, 0.125, 1, 2, 0, *key(layout), layout.tile.code)
    yield OPS.kv_attention.default, (*head, None, 0, 0, table)


@pytest.mark.parametrize("index", range(5))
def test_opcheck(index):
    op, arguments = list(samples())[index]
    opcheck(op, arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refusals(device):
    layout, _, pool, _ = make(128, 2)
    x, exact, query, table = torch.zeros(2, 2, 1, 128), torch.zeros(2, 2, 0, 128), torch.zeros(2, 4, 1, 128), TABLE[:2]
    cases = {
        "page_table must be int32, got torch.int64": {"page_table": table.long()},
        r"page_table must be \[B, max_pages\] .* got shape \(2, 0\)": {"page_table": table[:, :0]},
        r"words must be \[num_pages, slots, page_size, words\] .* got shape \(0,": {"words": pool[:0]},
    }
    store = {
        r"with B=3, got shape \(2, 2, 1, 128\)": {"page_table": TABLE},
        r"position must be int64 \[1\] or \[2, 1\]": {"position": table[:, :2]},
    }
    attend = {
        r"page_table 2 rows, got .* \(3, 3\)": {"page_table": TABLE},
        r"length must be int64 \[1\] or \[2\]": {"length": torch.zeros(3, dtype=torch.int64)},
        "max_tokens=12 columns, got 11": {"mask": torch.ones(1, 1, 1, 11, dtype=torch.bool)},
    }
    for message, change in (cases | store).items():
        given = {"words": pool, "x": x, "position": torch.zeros(2, 1, dtype=torch.int64), "page_table": table} | change
        given = {name: tensor.to(device) for name, tensor in given.items()}
        with pytest.raises((TypeError, ValueError), match=message):
            OPS.kv_store(given["words"], given["x"], given["position"], *key(layout), 0, None, 0, given["page_table"])
    for message, change in (cases | attend).items():
        given = {"words": pool, "length": torch.zeros(2, dtype=torch.int64), "mask": None, "page_table": table} | change
        given = {name: tensor if tensor is None else tensor.to(device) for name, tensor in given.items()}
        stored = (query.to(device), given["words"], given["words"], exact.to(device), exact.to(device))
        with pytest.raises((TypeError, ValueError), match=message):
            OPS.kv_attention(
                *stored, given["length"], None, given["mask"], 0.1, 0, 0, 0, *key(layout), layout.tile.code, page_table=given["page_table"]
            )
