"""The KV cache's kernels under Triton's interpreter, in a process of its own. python -m tests.ops.kernels.interpreted_kv"""

from __future__ import annotations

import torch
import triton

from hq_inductor.format.lattice import is_lattice_point
from hq_inductor.format.layout import TileLayout
from hq_inductor.format.rice import decode_tiles, encode_tiles
from hq_inductor.ops.fused_kv import FEW, MANY, AttentionLaunch, attend, store
from tests.kv_reference import attend_ref, decode_slots, encode_slots, paged, random_cache

# bps (of keys and of values), head_dim, tile, batch, slots, group, queries, max_tokens, length, sinks, window, sliding, start, mask, dtype,
# corrupt, launch
ATTENTION = [
    (4.0, 128, 128, 2, 1, 4, 1, 48, 45, 4, 8, 0, True, False, torch.bfloat16, False, AttentionLaunch(2, 1)),
    (2.0, 128, 128, 1, 1, 8, 1, 64, 60, 4, 12, 0, False, False, torch.float16, False, AttentionLaunch(1, 2)),
    ((3.0, 2.0), 128, 128, 1, 1, 3, 3, 44, 44, 3, 1, 0, False, True, torch.bfloat16, False, AttentionLaunch(1, 2)),
    (2.5, 64, 128, 1, 1, 2, 2, 48, 40, 0, 8, 0, False, False, torch.bfloat16, True, AttentionLaunch(2, 1)),
    ((3.5, 4.0), 128, 128, 1, 1, 4, 2, 48, 48, 4, 8, 24, False, "added", torch.float16, False, AttentionLaunch(1, 1)),
    (5.0, 128, 128, 1, 1, 4, 1, 32, 20, 0, 0, 0, False, False, torch.bfloat16, True, AttentionLaunch(1, 1)),
    (4.0, 256, 256, 1, 1, 2, 1, 40, 40, 4, 20, 0, False, False, torch.bfloat16, False, AttentionLaunch(1, 1)),
    ((3.0, 2.0), 80, 640, 1, 1, 1, 1, 32, 30, 2, 8, 0, False, True, torch.float16, False, AttentionLaunch(1, 2)),
    (4.0, 128, 128, 1, 1, 4, 2, 64, 3, 4, 16, 0, False, False, torch.bfloat16, False, AttentionLaunch(1, 2)),
]


def check_attention(
    bps, head_dim, tile, batch, heads, group, queries, max_tokens, length, sinks, window, sliding, start, mask, dtype, corrupt, launch
):
    layouts = [TileLayout("e8", tile, int(8 * b), int(tile * b) // 32) for b in (bps if isinstance(bps, tuple) else (bps, bps))]
    cache = random_cache(layouts, head_dim, batch, heads, max_tokens, length, sinks, window, dtype)
    kv_heads = heads * (tile // head_dim)
    query = torch.randn(batch, kv_heads * group, queries, head_dim).mul_(3).to(dtype)
    start = torch.randint(0, length // 2, (batch,)) if start else None
    if mask == "added":
        mask = torch.randn(batch, kv_heads * group, queries, max_tokens).mul_(3).to(dtype)
        mask[mask < -3] = float("-inf")
    else:
        mask = torch.rand(batch, 1, queries, max_tokens) < 0.8 if mask else None
    arguments = (query, *cache, torch.tensor([length]), start, mask, head_dim**-0.5, sinks, window, sliding, *layouts)
    expected = attend_ref(*arguments)
    found = attend(*arguments, launch)
    assert found.shape == query.shape and found.dtype == dtype
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < 1.5 * torch.finfo(dtype).eps, error
    if corrupt:
        # any bits: no access out of range (the interpreter would crash), and numbers
        noise = [torch.randint(-(2**31), 2**31, words.shape).to(torch.int32) for words in cache[:2]]
        assert attend(query, *noise, *arguments[3:], launch).isfinite().all()


def check_paged_attention(lengths, entries, page_size):
    """Each row at its own length, from pages in no order; what has no page is as good as masked."""
    layout, max_tokens, sinks, window, dtype = TileLayout("e8", 128, 28, 14), 2 * page_size, 2, 5, torch.bfloat16
    rows = [random_cache([layout, layout], 128, 1, 1, max_tokens, length, sinks, window, dtype) for length in lengths]
    cache = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    pools, table = paged(cache[:2], page_size)
    query = torch.randn(2, 2, 2, 128).mul_(3).to(dtype)
    mask = torch.rand(2, 1, 2, max_tokens) < 0.8
    seen = mask.clone()
    for (b, page), entry in entries.items():
        table[b, page] = entry
        seen[b, ..., max(page * page_size, sinks) : min((page + 1) * page_size, lengths[b] - window)] = False
    tail = (128**-0.5, sinks, window, 0, layout, layout)
    found = attend(query, *pools, *cache[2:], torch.tensor(lengths), None, mask, *tail, AttentionLaunch(2, 1), table)
    for b, length in enumerate(lengths):
        row = [x[b : b + 1] for x in (query, *cache)]
        expected = attend_ref(*row, torch.tensor([length]), None, seen[b : b + 1], *tail)
        error = (found[b : b + 1].double() - expected).abs().max() / expected.abs().max()
        assert error < 1.5 * torch.finfo(dtype).eps, error


# bps, tile, head_dim, effort, launches: every Rice parameter, joined heads with and without a missing one, tiles that fill no power of two
STORE = [
    (2.0, 128, 128, 1, FEW),
    (2.5, 128, 64, 0, MANY),
    (3.0, 256, 256, 1, MANY),
    (4.0, 128, 128, 0, FEW),
    (3.5, 384, 96, 0, FEW),
    (5.0, 128, 128, 1, MANY),
    (6.0, 128, 128, 0, MANY),
]


def check_store(bps, tile, head_dim, effort, launches):
    """As good as the CPU's encoder, sum for sum of squared errors; hard vectors decode; places that are not meant stay."""
    layout, join = TileLayout("e8", tile, int(8 * bps), int(tile * bps) // 32), tile // head_dim
    kv_heads, tokens, max_tokens = 2 * join - (join > 1), 4, 6
    x = torch.randn(1, tokens, kv_heads, head_dim).transpose(1, 2)
    x[:, :, 1] = 0
    x[:, 0, 2] = 0
    x[0, 0, 2, 5] = 1000.0
    x[0, 0, 3, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    position = torch.tensor([4, -1, 1, 6]) if effort else torch.tensor([5, 3, 0, 2])
    words = torch.full((1, 2, max_tokens, layout.words), 77, dtype=torch.int32)
    store(words, x, position, layout, effort, launches[effort])
    slots = torch.zeros(1, 2 * join, tokens, head_dim)
    slots[:, :kv_heads] = x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    slots = slots.unflatten(1, (2, join)).transpose(2, 3).flatten(-2)
    inside = (position >= 0) & (position < max_tokens)
    untouched = torch.ones(max_tokens, dtype=torch.bool)
    untouched[position[inside]] = False
    assert (words[:, :, untouched] == 77).all()
    written, slots = words[:, :, position[inside]], slots[:, :, inside]
    # what is decoded encodes to the same bits: nothing was lost where regions meet
    codes, scale = decode_tiles(written.reshape(-1, layout.words), layout)
    assert is_lattice_point(codes.view(-1, 8), "e8").all()
    assert torch.equal(encode_tiles(codes, scale, layout), written.reshape(-1, layout.words))
    found, expected = ((decode_slots(w, layout) - slots).square().sum((0, 1, 3)) for w in (written, encode_slots(slots, layout, effort)))
    # tokens that are not Gaussian: where clipping decides, the two searches stop at different scales that both are allowed
    assert (found <= torch.tensor([1.05, 1.05, 2.0, 1.05])[inside] * expected + 1e-12).all(), (found, expected)


def check_store_pair():
    """Two in one launch, each with strides of its own, get the words that they get alone."""
    layout = TileLayout("e8", 128, 20, 10)
    states = torch.randn(1, 2, 3, 64).transpose(1, 2), torch.randn(1, 3, 2, 64)
    pair, alone = ([torch.full((1, 2, 3, layout.words), 77, dtype=torch.int32) for _ in states] for _ in range(2))
    position = torch.tensor([2, 0])
    store(pair[0], states[0], position, layout, 0, other=(pair[1], states[1]))
    for words, x, found in zip(alone, states, pair, strict=True):
        store(words, x, position, layout, 0)
        assert torch.equal(words, found)
    assert not torch.equal(*pair)


def check_paged_store(page_size):
    """In pages the slots of a contiguous cache, row by row; nothing anywhere else, and nothing without a page."""
    layout = TileLayout("e8", 128, 24, 12)
    x, position = torch.randn(2, 1, 3, 128), torch.tensor([[0, 2 * page_size - 1, -1], [page_size, 2 * page_size, page_size - 1]])
    words = torch.full((2, 1, 2 * page_size, layout.words), 77, dtype=torch.int32)
    store(words, x, position, layout, 0)
    alone = torch.full_like(words[:1], 77)
    store(alone, x[1:], position[1], layout, 0)
    assert torch.equal(alone, words[1:]) and (words[:, 0, :, 0] != 77).nonzero().tolist() == [
        [0, 0],
        [0, 2 * page_size - 1],
        [1, page_size - 1],
        [1, page_size],
    ]
    # between pages that no row has
    buffer = torch.full((7, 1, page_size, layout.words), 77, dtype=torch.int32)
    pool, table = buffer[1:-1], torch.tensor([[3, 0], [2, 4]], dtype=torch.int32)
    for entries in (table, torch.tensor([[-1, 5], [2**31 - 1, -(2**31)]], dtype=torch.int32)):
        store(pool, x, position, layout, 0, page_table=entries)
        assert torch.equal(pool[table.long()].transpose(1, 2).reshape(words.shape), words) and (buffer[[0, 2, -1]] == 77).all()


def main() -> None:
    assert triton.knobs.runtime.interpret
    torch.manual_seed(0)
    for case in ATTENTION:
        check_attention(*case)
        print("ok", *case, flush=True)
    check_paged_attention((64, 40), {(0, 1): 2**31 - 1, (1, 0): -(2**31)}, 32)
    print("ok paged attention", flush=True)
    check_paged_store(6)
    print("ok paged store", flush=True)
    for case in STORE:
        check_store(*case)
        print("ok", *case[:4], flush=True)
    check_store_pair()
    print("ok pair", flush=True)


if __name__ == "__main__":
    main()
