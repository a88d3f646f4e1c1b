import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import hq_inductor  # noqa: F401  (registers the ops)
from hq_inductor.format.kv import exact_index, join_heads, kv_layout, split_heads
from hq_inductor.format.lattice import embed
from hq_inductor.format.layout import TileLayout
from hq_inductor.format.quantizer import quantize_tiles
from hq_inductor.format.rate_table import RATE_TABLE
from hq_inductor.format.rice import decode_tiles

OPS = torch.ops.hyperquant


def empty_words(batch, kv_heads, tokens, layout):
    return torch.zeros(batch, layout.slots(kv_heads), tokens, layout.tile.words, dtype=torch.int32)


def key(layout: TileLayout):
    return layout.lattice, layout.tile, layout.code


def load(words, layout, dtype=torch.float32):
    return OPS.kv_load(words, layout.head_dim, *key(layout.tile), dtype)


@pytest.mark.parametrize(("head_dim", "heads"), [(128, 2), (64, 3), (80, 2), (96, 4), (256, 1)])
@pytest.mark.parametrize(("bps", "effort", "lattice"), [(4, 0, "e8"), (2, 1, "e8"), (3, 1, "d4")])
def test_store_then_load_is_the_quantizer(head_dim, heads, bps, effort, lattice):
    layout = kv_layout(head_dim, bps, lattice)
    words = empty_words(2, heads, 7, layout)
    x = torch.randn(2, heads, 3, head_dim)
    position = torch.tensor([5, 0, 2])
    OPS.kv_store(words, x, position, *key(layout.tile), effort)
    tiles = join_heads(x, layout.join)
    codes, scale = quantize_tiles(tiles.reshape(-1, layout.tile.tile), layout.tile, RATE_TABLE[lattice][layout.tile.code].start_rms, effort)
    expected = split_heads((embed(codes, lattice) * scale[:, None]).view(tiles.shape), layout.join)
    loaded = load(words, layout)
    assert loaded.shape == (2, layout.slots(heads) * layout.join, 7, head_dim)
    assert torch.equal(loaded[:, :, position], expected)
    assert (words[:, :, [1, 3, 4, 6]] == 0).all()
    assert torch.equal(load(words, layout, torch.bfloat16), loaded.bfloat16())


@pytest.mark.parametrize("tokens", [1, 5])
def test_store_never_writes_out_of_range(tokens):
    """The cache is a window into a larger buffer whose surroundings must not change."""
    layout = kv_layout(128, 4)
    buffer = torch.full((3, 2, 8, layout.tile.words), 77, dtype=torch.int32)
    words = buffer[1:2]
    x = torch.randn(1, 2, tokens, 128)
    for first in (-(2**62), -6, 8, 9, 2**62):
        OPS.kv_store(words, x, first + torch.arange(tokens), *key(layout.tile), 0)
        assert (buffer == 77).all()
    OPS.kv_store(words, x, 7 + torch.arange(tokens), *key(layout.tile), 0)
    assert (buffer[1, :, 7] != 77).any() and (buffer[1, :, :7] == 77).all() and (buffer[[0, 2]] == 77).all()
    OPS.kv_store(words, x, 1 - tokens + torch.arange(tokens), *key(layout.tile), 0)
    assert torch.equal(decode_tiles(buffer[1, :, 0], layout.tile)[0], decode_one(x[0, :, -1], layout.tile))


def decode_one(x, layout):
    return quantize_tiles(x, layout, RATE_TABLE[layout.lattice][layout.code].start_rms, 0)[0]


def a_cache(head_dim, kv_heads, tokens, length, sinks, window, bps=4, batch=2):
    """Words, exact buffers, and the keys or values that attention should see, `[B, kv_heads, length, D]`."""
    layout = kv_layout(head_dim, bps)
    x = torch.randn(batch, kv_heads, length, head_dim)
    words = empty_words(batch, kv_heads, tokens, layout)
    OPS.kv_store(words, x, torch.arange(length), *key(layout.tile), 0)
    exact = torch.full((batch, kv_heads, sinks + window, head_dim), float("nan"))
    seen = load(words, layout)[:, :kv_heads, :length].clone()
    for position in range(length):
        if position < sinks or position >= length - window:
            exact[:, :, exact_index(torch.tensor(position), sinks, window)] = x[:, :, position]
            seen[:, :, position] = x[:, :, position]
    return words, exact.nan_to_num(nan=1e4), seen, layout


def attention(query, k, v, length, start=None, mask=None, sinks=0, window=0, sliding=0, scale=0.1):
    layouts = (k[3].tile.lattice, k[3].tile.tile, k[3].tile.code, v[3].tile.code)
    return OPS.kv_attention(query, k[0], v[0], k[1], v[1], torch.tensor([length]), start, mask, scale, sinks, window, sliding, *layouts)


@pytest.mark.parametrize("head_dim", [128, 64, 80])
@pytest.mark.parametrize(
    ("length", "queries", "sinks", "window"), [(20, 1, 4, 8), (20, 5, 0, 8), (9, 9, 2, 3), (6, 2, 4, 8), (12, 1, 3, 0), (12, 2, 0, 0)]
)
@pytest.mark.parametrize("case", ["causal", "start", "sliding", "bool mask", "float mask"])
def test_attention_against_sdpa(head_dim, length, queries, sinks, window, case):
    torch.manual_seed(length)
    kv_heads, heads, tokens = 2, 6, 24
    k = a_cache(head_dim, kv_heads, tokens, length, sinks, window)
    v = a_cache(head_dim, kv_heads, tokens, length, sinks, window, bps=3)
    query = torch.randn(2, heads, queries, head_dim)
    start = torch.tensor([0, 3]) if case == "start" else None
    sliding = 5 if case == "sliding" else 0
    mask = None
    if case == "bool mask":
        mask = (torch.rand(2, 1, queries, tokens + 3) < 0.5).index_fill(3, torch.tensor([0]), True)
    elif case == "float mask":
        mask = torch.randn(1, heads, queries, tokens)
        mask[..., 1::3] = float("-inf")
        mask[..., 2::5] = torch.finfo(torch.float32).min
    out = attention(query, k, v, length, start, mask, sinks, window, sliding)

    bias = torch.zeros(2, heads, queries, length, dtype=torch.float64)
    for b in range(2):
        for s in range(queries):
            own = length - queries + s
            for p in range(length):
                hidden = p > own or (start is not None and p < start[b]) or (sliding and p <= own - sliding)
                if mask is not None and mask.dtype == torch.bool:
                    hidden = hidden or not mask[b, 0, s, p]
                elif mask is not None:
                    # what hides so much of a score hides it
                    bias[b, :, s, p] += mask[0, :, s, p] if mask[0, 0, s, p] > -1e30 else float("-inf")
                if hidden:
                    bias[b, :, s, p] = float("-inf")
    expected = F.scaled_dot_product_attention(query.double(), k[2].double(), v[2].double(), attn_mask=bias, scale=0.1, enable_gqa=True)
    # a query before `start` sees nothing
    expected = torch.where(bias.isinf().all(-1, keepdim=True), 0, expected)
    assert torch.allclose(out.double(), expected, atol=2e-5)


def test_queries_that_see_nothing_yield_zeros():
    k = v = a_cache(128, 1, 8, 6, 0, 2)
    out = attention(torch.randn(2, 1, 6, 128), k, v, 6, start=torch.tensor([2, 8]), window=2)
    assert (out[0, :, :2] == 0).all() and (out[0, :, 2:] != 0).any() and (out[1] == 0).all()


@pytest.mark.parametrize(("length", "start"), [(-5, 0), (0, -(2**40)), (9, 2**40), (2**40, 3), (-(2**62), -(2**62))])
def test_corrupt_words_and_lengths_are_harmless(length, start):
    layout = kv_layout(64, 3)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (1, 1, 8, layout.tile.words), generator=generator, dtype=torch.int64).to(torch.int32)
    exact = torch.randn(1, 2, 5, 64)
    assert load(words, layout).isfinite().all() and load(words, layout, torch.float16).isfinite().all()
    cache = (words, exact, None, layout)
    out = attention(torch.randn(1, 2, 2, 64), cache, cache, length, torch.tensor([start]), sinks=2, window=3)
    assert out.isfinite().all()


def samples():
    layout = kv_layout(64, 3)
    arguments = key(layout.tile)
    words = empty_words(2, 3, 6, layout)
    x = torch.randn(2, 4, 3, 64).transpose(1, 2)[:, :, :3]  # permuted, `[2, 3, 3, 64]`
    OPS.kv_store(words, x, torch.arange(3), *arguments, 0)
    yield OPS.kv_store.default, (words.clone(), x, torch.tensor([1, 5, 9]), *arguments, 1)
    yield OPS.kv_store.default, (words.clone(), x, torch.tensor([1, 5, 9]), *arguments, 0, "full", 3)
    other = kv_layout(64, 2)
    for lower, dither in ((layout, None), (other, "half")):
        pair = (words.clone(), empty_words(2, 3, 6, lower), x, x + 1, torch.tensor([1, 5, 9]))
        yield OPS.kv_store_pair.default, (*pair, *arguments, lower.tile.code, 0, dither, 3, 4)
    for dtype in (torch.float32, torch.bfloat16):
        yield OPS.kv_load.default, (words, 64, *arguments, dtype)
    yield OPS.kv_load.default, (words, 64, *arguments, torch.float32, "half", 5)
    exact = torch.randn(2, 3, 4, 64)
    for queries, mask, start, dither in (
        (1, None, None, None),
        (2, torch.ones(2, 1, 2, 8, dtype=torch.bool), torch.tensor([0, 1]), "full"),
    ):
        query = torch.randn(2, queries, 6, 64).transpose(1, 2)
        head = (query, words, words, exact, exact, torch.tensor([3]), start, mask)
        yield OPS.kv_attention.default, (*head, 0.125, 1, 3, 0, *arguments, layout.tile.code, dither, 1, 2)


@pytest.mark.parametrize("index", range(9))
def test_opcheck(index):
    op, arguments = list(samples())[index]
    opcheck(op, arguments)


@pytest.mark.parametrize(("bps", "dither"), [((4, 4), None), ((3, 2), "full")])
def test_a_pair_is_keys_and_values_stored(bps, dither):
    layouts = [kv_layout(64, b, dither=dither) for b in bps]
    states, position = torch.randn(2, 2, 3, 4, 64), torch.tensor([6, 0, 8, 2])
    (lattice, tile, k_code), v_code = key(layouts[0].tile), layouts[1].tile.code
    pair, alone = ([empty_words(2, 3, 8, layout) for layout in layouts] for _ in range(2))
    OPS.kv_store_pair(*pair, *states, position, lattice, tile, k_code, v_code, 0, dither, 5, 6)
    for words, x, code, seed in zip(alone, states, (k_code, v_code), (5, 6), strict=True):
        OPS.kv_store(words, x, position, lattice, tile, code, 0, dither, seed)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(pair, alone, strict=True))


def test_a_pair_follows_a_page_table():
    layouts = kv_layout(128, 3), kv_layout(128, 2)
    pools = [torch.zeros(4, 2, 4, layout.tile.words, dtype=torch.int32) for layout in layouts]
    whole = [empty_words(2, 2, 8, layout) for layout in layouts]
    states, position, table = (
        torch.randn(2, 2, 2, 2, 128),
        torch.tensor([[1, 6], [4, 0]]),
        torch.tensor([[3, 0], [1, 2]], dtype=torch.int32),
    )
    codes = *key(layouts[0].tile), layouts[1].tile.code
    OPS.kv_store_pair(*pools, *states, position, *codes, 0, page_table=table)
    OPS.kv_store_pair(*whole, *states, position, *codes, 0)
    for pool, words in zip(pools, whole, strict=True):
        assert torch.equal(pool[table.long()].transpose(1, 2).reshape(words.shape), words) and words.any()


@pytest.mark.parametrize("change", ["shape", "v_words", "v"])
def test_a_pair_that_does_not_fit_stores_nothing(change):
    layout = kv_layout(128, 4)
    k_words, v_words = (empty_words(1, 2, 4, layout) for _ in range(2))
    k, v, position = torch.randn(1, 2, 1, 128), torch.randn(1, 2, 1, 128), torch.tensor([0])
    v, v_words = {"shape": (v[:, :1], v_words), "v_words": (v, v_words[:, :1]), "v": (v.int(), v_words)}[change]
    with pytest.raises(
        (ValueError, TypeError), match=r"k and v must have one shape|x must have heads for 1 slots|x must be floating point"
    ):
        OPS.kv_store_pair(k_words, v_words, k, v, position, *key(layout.tile), layout.tile.code, 0)
    assert not k_words.any()


def test_no_host_sync_when_storing():
    """On the meta device a read of a value raises: what runs on CUDA."""
    from hq_inductor.ops.kv import write_rows

    for tokens in (1, 4):
        write_rows(
            torch.empty(2, 3, 8, 5, device="meta"),
            torch.empty(tokens, dtype=torch.int64, device="meta"),
            torch.empty(2, 3, tokens, 5, device="meta"),
        )


WRONG = {
    "words must be int32": {"words": torch.zeros(1, 1, 4, 16)},
    r"words must be \[B, slots": {"words": torch.zeros(1, 4, 16, dtype=torch.int32)},
    "x must be floating point": {"x": torch.zeros(1, 1, 2, 128, dtype=torch.int32)},
    r"x must be \[B, heads, S, head_dim\] with B=1": {"x": torch.zeros(2, 1, 2, 128)},
    "head_dim must divide tile=128, got 100": {"x": torch.zeros(1, 1, 2, 100)},
    "x must have heads for 1 slots of 1, got 2 heads": {"x": torch.zeros(1, 2, 2, 128)},
    r"position must be int64 \[2\]": {"position": torch.zeros(3, dtype=torch.int64)},
    "effort must be 0, 1 or 2, got 5": {"effort": 5},
    "dither must be None, 'half' or 'full', got 'quarter'": {"dither": "quarter"},
    "lattice must be one of": {"lattice": "e7"},
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_store_refuses(message, device):
    layout = kv_layout(128, 4).tile
    good = {
        "words": torch.zeros(1, 1, 4, 16, dtype=torch.int32),
        "x": torch.zeros(1, 1, 2, 128),
        "position": torch.arange(2),
        "lattice": "e8",
        "tile": 128,
        "code": layout.code,
        "effort": 0,
        "dither": None,
        "seed": 0,
    }
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (good | WRONG[message]).items()}
    with pytest.raises((ValueError, TypeError), match=message):
        OPS.kv_store(**arguments)


def test_attention_refuses():
    k = a_cache(128, 2, 8, 6, 1, 2)
    query = torch.randn(2, 4, 1, 128)
    cases = {
        r"k_exact must have shape \(2, 2, 4, 128\)": {"window": 3},
        "window must be at least 0, got -1": {"window": -1},
        "mask must have at least max_tokens=8 columns, got 6": {"mask": torch.ones(2, 1, 1, 6, dtype=torch.bool)},
        r"mask must be \[2 or 1, 1 or 4, 1, T\]": {"mask": torch.ones(2, 2, 1, 8, dtype=torch.bool)},
        r"start must be int64 \[2\]": {"start": torch.zeros(1, dtype=torch.int64)},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            attention(query, k, k, 6, **({"sinks": 1, "window": 2} | change))
    with pytest.raises(ValueError, match="3 query heads, 2 heads in k_exact"):
        attention(torch.randn(2, 3, 1, 128), k, k, 6, sinks=1, window=2)
