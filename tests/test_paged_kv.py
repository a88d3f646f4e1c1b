"""A paged cache against caches of one row each: lengths, pages and neighbours make no difference."""

import random

import pytest
import torch

from hq_inductor.cache import KVConfig, PagedKV, PageTable, QuantizedKV

PAGE, MAX_TOKENS = 16, 64


def config(**options):
    return KVConfig(**{"window": 6, "sinks": 2, "effort": 0, **options})


def make(batch=3, num_pages=8, sliding_window=0, **options):
    """A paged cache, its page table, and a cache for each row."""
    pages = PageTable(batch, num_pages, PAGE, MAX_TOKENS)
    arguments = {"layer": 1, "sliding_window": sliding_window, "dtype": torch.float32}
    paged = PagedKV(config(**options), pages, 1, 128, **arguments)
    return paged, pages, [QuantizedKV(config(**options), 1, 1, 128, MAX_TOKENS, **arguments) for _ in range(batch)]


def store(paged, rows, new, seed=0):
    """The last `new[b]` of as many tokens as the largest of them, in both."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(len(new), 1, max(new), 128, generator=generator) + 1 for _ in range(2))
    paged.store(k, v, torch.tensor(new))
    for b, row in enumerate(rows):
        row.store(*(x[b : b + 1, :, max(new) - new[b] :] for x in (k, v)))


def compare(paged, rows, queries=1):
    lengths = [int(row.length) for row in rows]
    assert paged.length.tolist() == lengths
    query = torch.randn(len(rows), 2, queries, 128)
    found = paged.attend(query)
    stored = paged.dequantize()
    for b, row in enumerate(rows):
        if lengths[b]:
            assert torch.allclose(found[b : b + 1], row.attend(query[b : b + 1]), atol=1e-4)
        for x, y in zip(stored, row.dequantize(), strict=True):
            assert torch.allclose(x[b, :, : lengths[b]], y[0, :, : lengths[b]], atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"dither": "full", "center": False, "lattice": "d4"}], ids=str)
def test_rows_are_caches_of_their_own(options):
    """Prompts of different length, rows that pause, one that ends and whose pages another takes."""
    paged, pages, rows = make(**options)
    # other numbers for each page than in order
    pages._free = [5, 0, 7, 2, 6, 1, 4, 3]
    pages.reserve([17, 33, 3])
    store(paged, rows, [17, 33, 3])
    compare(paged, rows, 3)
    pages.reserve([18, 33, 4])
    store(paged, rows, [1, 0, 1], 1)
    compare(paged, rows)
    pages.free(1)
    paged.reset(1)
    rows[1].reset()
    compare(paged, rows)
    pages.reserve([40, 20, 36])
    store(paged, rows, [22, 20, 32], 2)
    assert pages.free_pages == 0
    compare(paged, rows, 2)


@pytest.mark.parametrize("dither", [None, "full"])
def test_crop(dither):
    paged, pages, rows = make(dither=dither)
    pages.reserve([30, 20, 5])
    store(paged, rows, [30, 20, 5])
    for removed in ([4, 0, 2], [7, 7, 3], [2, 2, 0]):
        same = len(set(removed)) == 1
        paged.crop(removed[0] if same else torch.tensor(removed))
        for row, count in zip(rows, removed, strict=True):
            row.crop(count)
        compare(paged, rows)
        store(paged, rows, [1, 1, 1], 3)
        compare(paged, rows)
    paged.crop(100)
    assert paged.length.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="tokens must be at least 0, got -1"):
        paged.crop(-1)


def test_pages_behind_a_sliding_window_may_go():
    paged, pages, rows = make(batch=1, sliding_window=8)
    pages.reserve([50])
    store(paged, rows, [50])
    query = torch.randn(1, 2, 2, 128)
    expected = paged.attend(query)
    pages.entries[0, :2] = -1
    assert torch.equal(paged.attend(query), expected)
    store(paged, rows, [1], 1)
    assert torch.allclose(paged.attend(query), rows[0].attend(query), atol=1e-4)


def snapshot(paged):
    return {name: tensor.clone() for name, tensor in {**paged.tensors(), "entries": paged.page_table}.items()}


def test_what_does_not_fit_is_refused_and_nothing_changes():
    paged, pages, rows = make()
    pages.reserve([20, 16, 40])
    store(paged, rows, [20, 16, 40])
    before, free = snapshot(paged), pages.free_pages
    k = torch.zeros(3, 1, 17, 128)
    refused = {
        r"pages have run out: num_pages must be at least 9, got 8; free a row first": lambda: pages.reserve([64, 32, 40]),
        r"tokens must be from 0 to max_tokens=64, got \[20, 65, 40\]": lambda: pages.reserve([20, 65, 40]),
        "tokens must have a number for each of 3 rows, got 2": lambda: pages.reserve([20, 20]),
        "row must be from 0 to 2, got 3": lambda: pages.free(3),
        "row 1 must have pages for 17 tokens": lambda: paged.store(k[:, :, :1], k[:, :, :1]),
        "max_tokens must be at least 65, got 64": lambda: paged.store(*[torch.zeros(3, 1, 25, 128)] * 2, torch.tensor([0, 0, 25])),
        r"tokens must be int64 \[3\], got torch.int64 \(2,\)": lambda: paged.store(k, k, torch.zeros(2, dtype=torch.int64)),
        r"k must have shape \[3, 1, S, 128\]": lambda: paged.store(k[:2], k[:2]),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
        assert pages.free_pages == free and all(torch.equal(x, before[name]) for name, x in snapshot(paged).items()), message
    for call in (paged.reorder, paged.select_batch):
        with pytest.raises(NotImplementedError, match="rows of a paged cache"):
            call(torch.arange(3))
    for arguments, message in (
        ((0, 1, 16, 1), "batch"),
        ((1, 0, 16, 1), "num_pages"),
        ((1, 1, 16, 0), "max_tokens"),
        ((1, 1, 24, 1), "page_size"),
    ):
        with pytest.raises(ValueError, match=f"{message} must be"):
            PageTable(*arguments)


def test_no_page_is_in_two_rows():
    pages, held, generator = PageTable(4, 20, PAGE, 10 * PAGE), [0] * 4, random.Random(0)
    refused = 0
    for _ in range(300):
        b = generator.randrange(4)
        if generator.random() < 0.3:
            pages.free(b)
            held[b] = 0
        else:
            wanted = list(held)
            wanted[b] = generator.randrange(10 * PAGE + 1)
            needed = [max(old, -(-n // PAGE)) for old, n in zip([-(-n // PAGE) for n in held], wanted, strict=True)]
            if sum(needed) > 20:
                refused += 1
                with pytest.raises(ValueError, match="pages have run out"):
                    pages.reserve(wanted)
            else:
                pages.reserve(wanted)
                held[b] = max(held[b], wanted[b])
        mapped = pages.entries[pages.entries >= 0].tolist()
        assert len(set(mapped)) == len(mapped) == 20 - pages.free_pages
        assert (pages.entries >= 0).sum(1).tolist() == [-(-n // PAGE) for n in held]
    assert 10 < refused < 200


def test_a_compiled_step_is_one_graph_while_rows_grow_and_end():
    paged, pages, rows = make(batch=2)

    def step(k, v, query, tokens):
        paged.store(k, v, tokens)
        return paged.attend(query)

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    lengths = [0, 0]
    frames = torch._dynamo.utils.counters["frames"]
    for index in range(24):
        if index == 20:
            pages.free(1)
            paged.reset(1)
            rows[1].reset()
            lengths[1] = 0
        new = [1, index % 2]
        lengths = [a + b for a, b in zip(lengths, new, strict=True)]
        pages.reserve(lengths)
        k, v, query = torch.randn(2, 1, 1, 128), torch.randn(2, 1, 1, 128), torch.randn(2, 2, 1, 128)
        found = run(k, v, query, torch.tensor(new))
        for b, row in enumerate(rows):
            row.store(k[b : b + 1, :, : new[b]], v[b : b + 1, :, : new[b]])
            if lengths[b]:
                assert torch.allclose(found[b : b + 1], row.attend(query[b : b + 1]), atol=1e-4)
        if index == 1:
            started = frames["total"]
    assert frames["total"] == started, "recompiled while the cache grows"
    # beyond the pages: nothing is written, and what is exact is seen
    before = paged.k_words.clone()
    for _ in range(20):
        out = run(k, v, query, torch.ones(2, dtype=torch.int64))
    assert out.isfinite().all() and paged.length.tolist() == [n + 20 for n in lengths]
    changed = (paged.k_words != before).flatten(1).any(1)
    assert changed[~torch.isin(torch.arange(8), pages.entries)].sum() == 0
