"""`hyperquant::kv_attention`: attention over a cache of entropy-coded slots and exact tokens.

Definition.  `softmax(scale q k^T + mask) v`, softmax in fp32. Keys and values of positions `[sinks, length - window)` come from slots,
             all others from the exact buffers (`hq_inductor.format.kv`). Queries are in K's rotated basis, results in V's.
             Query s of S stands at position `length - S + s` and sees positions up to its own, from `start` on, of the newest
             `sliding_window`, where `mask` allows: bools are true there, numbers are added to the scores, and -1e30 or less hides. A query
             that sees nothing yields zeros. `length` is that of all rows of the batch, or one for each. With a page table, words are
             pools, and positions of slots without a page are not seen.
Invariants.  No host sync. Any words, lengths, starts and page tables are read without error; corrupt ones give wrong finite numbers.
Choice.      On a CPU, plain PyTorch over the stored tokens. On CUDA the kernel that decodes while it attends
             (`hq_inductor.ops.fused_kv.attend`), where its `unsupported` has no objection: few queries, e8. Otherwise slots are decoded
             to the queries' dtype for the library's attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..format.dither import check_dither
from ..format.kv import exact_index
from ..format.layout import TileLayout
from .kv import check_words, load, slot_heads
from .paging import cache_shape, check_page_table, gather_pages
from .registry import check_floating, register, traced

# what is added to a score and takes its token out: kernels do not tell such scores from those of tokens that are not seen
_HIDES = -1e30


def exact_positions(tokens: int, length: torch.Tensor, sinks: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions are exact, bool `[B or 1, T]` for lengths `[B or 1]`, and where those lie in the exact buffers, int64 `[T]`."""
    position = torch.arange(tokens, device=length.device)
    index = exact_index(position, sinks, window)
    return ((position < sinks) | (position >= (length - window)[:, None])) & (index >= 0), index.clamp(min=0)


def merge_exact(decoded: torch.Tensor, exact: torch.Tensor, length: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """Decoded tokens `[B, heads, T, D]`, those of the sinks and the window replaced by their exact values, `[B, kv_heads, T, D]`."""
    decoded = decoded[:, : exact.shape[1]]
    if sinks + window == 0:
        return decoded
    kept, index = exact_positions(decoded.shape[2], length, sinks, window)
    return torch.where(kept[:, None, :, None], exact.index_select(2, index).to(decoded.dtype), decoded)


def visible(query_tokens: int, tokens: int, length: torch.Tensor, start: torch.Tensor | None, sliding_window: int) -> torch.Tensor:
    """Which positions each query sees, bool `[B or 1, 1, S, T]`."""
    position = torch.arange(tokens, device=length.device)
    own = length[:, None, None, None] - query_tokens + torch.arange(query_tokens, device=length.device)[:, None]
    seen = position <= own
    if sliding_window:
        seen = seen & (position > own - sliding_window)
    return seen if start is None else seen & (position >= start[:, None, None, None])


def _allows(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask does not hide."""
    return mask if mask.dtype == torch.bool else mask > _HIDES


def attend_ref(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Grouped-query attention in fp32 (fp64 for fp64 queries).

    Args:
        query: `[B, Hq, S, D]`.
        keys, values: `[B, kv_heads, T, D]`.
        seen: bool `[B or 1, 1, S, T]`.
        mask: bool, or added to the scores; `[B or 1, 1 or Hq, S, T or more]`.

    Returns:
        `[B, Hq, S, D]` in the dtype of `query`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, tokens, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.to(dtype).reshape(batch, kv_heads, -1, head_dim)
    scores = (grouped @ keys.to(dtype).mT).view(batch, heads, tokens, -1) * scale
    if mask is not None:
        mask = mask[..., : keys.shape[2]]
        seen = seen & _allows(mask)
        if mask.dtype != torch.bool:
            scores = scores + mask
    scores = scores.masked_fill(~seen, float("-inf"))
    # a row without a visible position has no maximum
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weights = (scores - top).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    return (weights.view(batch, kv_heads, -1, scores.shape[-1]) @ values.to(dtype)).view(query.shape).to(query.dtype)


def _attend_library(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """`attend_ref` by the library's attention in half precision."""
    bias = allowed = seen
    if mask is not None:
        mask = mask[..., : keys.shape[2]]
        bias = allowed = seen & _allows(mask)
        if mask.dtype != torch.bool:
            bias = mask.to(query.dtype).masked_fill(~allowed, float("-inf"))
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale, enable_gqa=query.shape[1] != keys.shape[1])
    # libraries differ in what a row without a visible position gives
    return torch.where(allowed.any(-1, keepdim=True), out, 0)


def _check_attention(query, k_words, v_words, k_exact, v_exact, length, start, mask, sinks, window, sliding_window, *layouts):
    """Layouts of keys and values, or `TypeError` / `ValueError`."""
    lattice, tile, k_code, v_code, dither, page_table = layouts
    check_floating("query", query)
    k_layout = check_words("k_words", k_words, lattice, tile, k_code)
    v_layout = check_words("v_words", v_words, lattice, tile, v_code)
    check_dither(dither)
    if query.dim() != 4:
        raise ValueError(f"query must be [B, Hq, S, D], got shape {tuple(query.shape)}")
    batch, heads, tokens, head_dim = query.shape
    join = slot_heads(tile, head_dim)
    if page_table is not None:
        check_page_table(page_table, k_words)
    rows, max_tokens = cache_shape(k_words, page_table)
    if k_words.shape[:3] != v_words.shape[:3] or rows != batch:
        shapes = f"{tuple(k_words.shape)}, {tuple(v_words.shape)}"
        if page_table is not None:
            raise ValueError(f"k_words, v_words must have one shape and page_table {batch} rows, got {shapes}, {tuple(page_table.shape)}")
        raise ValueError(f"k_words and v_words must be [{batch}, slots, max_tokens, words], got {shapes}")
    for name, number in (("sinks", sinks), ("window", window), ("sliding_window", sliding_window)):
        if number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
    kv_heads = k_exact.shape[1]
    for name, exact in (("k_exact", k_exact), ("v_exact", v_exact)):
        check_floating(name, exact)
        if exact.shape != (batch, kv_heads, sinks + window, head_dim):
            raise ValueError(f"{name} must have shape {(batch, kv_heads, sinks + window, head_dim)}, got {tuple(exact.shape)}")
    if -(-kv_heads // join) != k_words.shape[1] or heads % kv_heads:
        raise ValueError(
            f"{heads} query heads, {kv_heads} heads in k_exact and {k_words.shape[1]} slots of {join} heads do not fit together"
        )
    if length.dtype != torch.int64 or tuple(length.shape) not in ((1,), (batch,)):
        raise ValueError(f"length must be int64 [1] or [{batch}], got {length.dtype} {tuple(length.shape)}")
    if start is not None and (start.dtype != torch.int64 or start.shape != (batch,)):
        raise ValueError(f"start must be int64 [{batch}], got {start.dtype} {tuple(start.shape)}")
    if mask is not None:
        shape = tuple(mask.shape)
        if mask.dim() != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] not in (1, tokens):
            raise ValueError(f"mask must be [{batch} or 1, 1 or {heads}, {tokens}, T], got shape {shape}")
        if shape[3] < max_tokens:
            raise ValueError(f"mask must have at least max_tokens={max_tokens} columns, got {shape[3]}")
        if mask.dtype != torch.bool:
            check_floating("mask", mask)
    return k_layout, v_layout


def _states(
    query: torch.Tensor,
    words: torch.Tensor,
    exact: torch.Tensor,
    length: torch.Tensor,
    sinks: int,
    window: int,
    layout: TileLayout,
    dither: str | None,
    seed: int,
) -> torch.Tensor:
    """Keys or values of all positions, `[B, kv_heads, T, D]`: half precision if the queries have it and are on CUDA, else fp32."""
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    decoded = load(words, query.shape[3], layout, query.dtype if half else torch.float32, dither, seed)
    return merge_exact(decoded, exact, length, sinks, window)


def _kv_attention(
    query: torch.Tensor,
    k_words: torch.Tensor,
    v_words: torch.Tensor,
    k_exact: torch.Tensor,
    v_exact: torch.Tensor,
    length: torch.Tensor,
    start: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    sinks: int,
    window: int,
    sliding_window: int,
    lattice: str,
    tile: int,
    k_code: int,
    v_code: int,
    dither: str | None = None,
    k_seed: int = 0,
    v_seed: int = 0,
    page_table: torch.Tensor | None = None,
) -> torch.Tensor:
    layouts = (lattice, tile, k_code, v_code, dither, page_table)
    k_layout, v_layout = _check_attention(
        query, k_words, v_words, k_exact, v_exact, length, start, mask, sinks, window, sliding_window, *layouts
    )
    # slots that are not in use yet need no decoding; reading the length is no sync on a CPU
    used = cache_shape(k_words, page_table)[1]
    if not query.is_cuda:
        used = min(max(int(length.max()), 1), used)
    if page_table is not None:
        page_table = page_table[:, : -(-used // k_words.shape[2])]
        k_words, there = gather_pages(k_words, page_table)
        v_words, _ = gather_pages(v_words, page_table)
    k_words, v_words = k_words[:, :, :used], v_words[:, :, :used]
    keys = _states(query, k_words, k_exact, length, sinks, window, k_layout, dither, k_seed)
    values = _states(query, v_words, v_exact, length, sinks, window, v_layout, dither, v_seed)
    seen = visible(query.shape[2], used, length, start, sliding_window)
    if page_table is not None:
        exact, _ = exact_positions(used, length, sinks, window)
        seen = seen & (there[:, :used] | exact)[:, None, None]
    if keys.dtype == torch.float32:
        return attend_ref(query, keys, values, seen, mask, scale)
    return _attend_library(query, keys, values, seen, mask, scale)


def _kv_attention_cuda(
    query: torch.Tensor,
    k_words: torch.Tensor,
    v_words: torch.Tensor,
    k_exact: torch.Tensor,
    v_exact: torch.Tensor,
    length: torch.Tensor,
    start: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    sinks: int,
    window: int,
    sliding_window: int,
    lattice: str,
    tile: int,
    k_code: int,
    v_code: int,
    dither: str | None = None,
    k_seed: int = 0,
    v_seed: int = 0,
    page_table: torch.Tensor | None = None,
) -> torch.Tensor:
    from .fused_kv import attend, unsupported  # Triton is there on Linux only, and takes its time to import

    layouts = (lattice, tile, k_code, v_code, dither)
    stored = (k_words, v_words, k_exact, v_exact)
    k_layout, v_layout = _check_attention(query, *stored, length, start, mask, sinks, window, sliding_window, *layouts, page_table)
    if dither is None and all(tensor.is_contiguous() and tensor.numel() < 2**31 for tensor in stored):
        wide = None if mask is None else mask.expand(-1, -1, query.shape[2], -1)
        sides = ((k_words, k_exact), (v_words, v_exact.to(k_exact.dtype)))
        if not any(unsupported(query, words, exact, wide, k_layout, v_layout, page_table) for words, exact in sides):
            seen = (length, start, wide, scale, sinks, window, sliding_window)
            return attend(query, *stored, *seen, k_layout, v_layout, page_table=page_table)
    return _kv_attention(query, *stored, length, start, mask, scale, sinks, window, sliding_window, *layouts, k_seed, v_seed, page_table)


def _kv_attention_fake(
    query,
    k_words,
    v_words,
    k_exact,
    v_exact,
    length,
    start,
    mask,
    scale,
    sinks,
    window,
    sliding_window,
    lattice,
    tile,
    k_code,
    v_code,
    dither=None,
    k_seed=0,
    v_seed=0,
    page_table=None,
):
    traced()
    layouts = (lattice, tile, k_code, v_code, dither, page_table)
    _check_attention(query, k_words, v_words, k_exact, v_exact, length, start, mask, sinks, window, sliding_window, *layouts)
    return query.new_empty(query.shape)


register(
    "kv_attention(Tensor query, Tensor k_words, Tensor v_words, Tensor k_exact, Tensor v_exact, Tensor length, Tensor? start, "
    "Tensor? mask, float scale, int sinks, int window, int sliding_window, str lattice, int tile, int k_code, int v_code, "
    "str? dither=None, int k_seed=0, int v_seed=0, Tensor? page_table=None) -> Tensor",
    _kv_attention_fake,
    replay=True,
    CPU=_kv_attention,
    CUDA=_kv_attention_cuda,
)
