"""The KV cache's contract in plain PyTorch, in double precision: what kernels are compared with."""

from __future__ import annotations

import torch

from hq_inductor.format.layout import TileLayout
from hq_inductor.format.quantizer import quantize_tiles
from hq_inductor.format.rates import start_rms
from hq_inductor.format.rice import decode_tiles, encode_tiles


def encode_slots(x: torch.Tensor, layout: TileLayout, effort: int = 0) -> torch.Tensor:
    """Words `[..., words]` of vectors `[..., tile]`, by the encoder for weights."""
    codes, scale = quantize_tiles(x.reshape(-1, layout.tile).float(), layout, start_rms(layout.code / 8, layout.lattice), effort)
    return encode_tiles(codes, scale, layout).view(*x.shape[:-1], layout.words)


def decode_slots(words: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """Vectors `[..., tile]` in fp64."""
    codes, scale = decode_tiles(words.reshape(-1, layout.words), layout)
    return (codes.double() * scale.double()[:, None]).view(*words.shape[:-1], layout.tile)


def random_cache(layouts: list[TileLayout], head_dim, batch, heads, max_tokens, length, sinks, window, dtype, device="cpu") -> tuple:
    """`k_words, v_words, k_exact, v_exact` of random tokens, layouts of K and of V; what is not stored is garbage."""
    words, exact = [], []
    for layout in layouts:
        join = layout.tile // head_dim
        x = torch.randn(batch, heads, max_tokens, layout.tile, device=device)
        # tokens differ in size
        x *= torch.rand(batch, heads, max_tokens, 1, device=device) + 0.3
        coded = encode_slots(x, layout)
        coded[:, :, length:] = torch.randint(-(2**31), 2**31, coded[:, :, length:].shape, device=device).to(torch.int32)
        words.append(coded)
        by_head = x.unflatten(-1, (join, head_dim)).transpose(2, 3).flatten(1, 2)
        ring = torch.full((batch, heads * join, sinks + window, head_dim), float("nan"), dtype=dtype, device=device)
        kept = [p for p in range(length) if p < sinks or p >= length - window]
        ring[:, :, [p if p < sinks else sinks + (p - sinks) % window for p in kept]] = by_head[:, :, kept].to(dtype)
        exact.append(ring)
    return (*words, *exact)


def paged(words: list[torch.Tensor], page_size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Contiguous caches `[B, slots, max_tokens, words]` as pools of pages in a random order, with one of garbage, and their page table."""
    batch, _, max_tokens, _ = words[0].shape
    max_pages = max_tokens // page_size
    table = torch.randperm(batch * max_pages + 1, device=words[0].device)[1:].view(batch, max_pages)
    pools = []
    for side in words:
        pages = side.unflatten(2, (max_pages, page_size)).transpose(1, 2)
        pool = torch.randint(-(2**31), 2**31, (batch * max_pages + 1, *pages.shape[2:]), device=side.device).to(torch.int32)
        pool[table] = pages
        pools.append(pool)
    return pools, table.to(torch.int32)


def attend_ref(
    query, k_words, v_words, k_exact, v_exact, length, start, mask, scale, sinks, window, sliding_window, k_layout, v_layout
) -> torch.Tensor:
    """`hq_inductor.ops.fused_kv.attend` in fp64."""
    batch, query_heads, queries, head_dim = query.shape
    stored, kv_heads = min(int(length), k_words.shape[2]), k_exact.shape[1]
    positions = torch.arange(stored, device=query.device)
    sides = []
    for words, exact, layout in ((k_words, k_exact, k_layout), (v_words, v_exact, v_layout)):
        join = layout.tile // head_dim
        x = decode_slots(words[:, :, :stored], layout).unflatten(-1, (join, head_dim)).transpose(2, 3).flatten(1, 2)[:, :kv_heads].clone()
        from_exact = (positions < sinks) | (positions >= int(length) - window)
        place = torch.where(positions < sinks, positions, sinks + (positions - sinks).remainder(max(window, 1)))
        x[:, :, from_exact] = exact[:, :, place[from_exact]].double()
        sides.append(x.repeat_interleave(query_heads // kv_heads, 1))
    at = int(length) - queries + torch.arange(queries, device=query.device)
    seen = positions <= at[:, None]
    if sliding_window:
        seen &= positions > at[:, None] - sliding_window
    seen = seen.expand(batch, 1, queries, stored)
    if start is not None:
        seen = seen & (positions >= start[:, None, None, None])
    scores = query.double() @ sides[0].mT * scale
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask[..., :stored]
    elif mask is not None:
        scores = scores + mask[..., :stored].double()
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.nan_to_num(scores.softmax(-1)) @ sides[1]
