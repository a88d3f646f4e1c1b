"""A coded KV cache as functions of plain tensors, for code that owns its buffers and positions.

Definition.  `kv_encode` subtracts an offset from new keys or values, rotates them, writes them to slots and exact buffers, `kv_encode_pair`
             does both, in one launch where keys and values have one rate; `kv_attention` rotates queries, attends over both
             (`hq_inductor.ops.attention`) and rotates the result back.
Invariants.  No host sync, static shapes. Tokens beyond the end of the cache are dropped.
"""

from __future__ import annotations

import torch

from ..format.kv import KVLayout, exact_index
from ..ops.kv import write_rows
from ..ops.paging import cache_shape


def rotate(x: torch.Tensor, matrix: torch.Tensor | None) -> torch.Tensor:
    """`x @ matrix` in the dtype of x; None: x."""
    return x if matrix is None else x @ matrix.to(x.dtype)


def _check_words(name: str, words: torch.Tensor, layout: KVLayout) -> None:
    if words.shape[-1] != layout.tile.words:
        bps = 32 * layout.tile.words / layout.tile.tile
        raise ValueError(f"{name} must have {layout.tile.words} words per slot ({bps:g} bits per value), got {words.shape[-1]}")


@torch.no_grad()
def kv_encode(
    words: torch.Tensor,
    exact: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    layout: KVLayout,
    rotation: torch.Tensor | None = None,
    *,
    sinks: int,
    window: int,
    offset: torch.Tensor | None = None,
    gain: float = 1.0,
    effort: int = 1,
    dither: str | None = None,
    seed: int = 0,
    page_table: torch.Tensor | None = None,
) -> None:
    """Write new keys or values of a layer into its cache, in place.

    Args:
        words: int32 `[B, slots, max_tokens, words]`, or with a page table `[num_pages, slots, page_size, words]`.
        exact: `[B, kv_heads, sinks + window, head_dim]`.
        x: `[B, kv_heads, S, head_dim]`, not rotated.
        position: int64 `[S]` on the device, or `[B, S]` of each row, consecutive; those outside of `[0, max_tokens)` are not written.
        layout: from `hq_inductor.format.kv.kv_layout`.
        rotation: `[head_dim, head_dim]`, applied from the right, or None.
        offset: `[B, kv_heads, 1, head_dim]`, subtracted from x; for keys, any vector that stays the same leaves attention as it is.
        gain: what slots are multiplied by; for keys without dither, `hq_inductor.format.kv.unbiased_gain(layout)`.
        sinks, window, effort, dither, seed: see `KVConfig`; `seed` is that of layer and role.
        page_table: int32 `[B, max_pages]`, see `hq_inductor.format.kv`, or None.

    Raises:
        ValueError, TypeError: shapes, dtypes or rates do not fit together.
    """
    _check_words("words", words, layout)
    x = _rotated("x", x, layout, rotation, offset)
    lattice, tile, code = layout.tile.lattice, layout.tile.tile, layout.tile.code
    scaled = x if gain == 1 else x * gain
    torch.ops.hyperquant.kv_store(words, scaled, position, lattice, tile, code, effort, dither, seed, page_table)
    write_rows(exact, _exact_places(position, cache_shape(words, page_table)[1], sinks, window), x.to(exact.dtype))


def _rotated(name: str, x: torch.Tensor, layout: KVLayout, rotation: torch.Tensor | None, offset: torch.Tensor | None) -> torch.Tensor:
    if x.shape[-1] != layout.head_dim:
        raise ValueError(f"{name} must have head_dim={layout.head_dim}, got {x.shape[-1]}")
    return rotate(x if offset is None else (x - offset).to(x.dtype), rotation)


def _exact_places(position: torch.Tensor, max_tokens: int, sinks: int, window: int) -> torch.Tensor:
    """Where new tokens go in the exact buffers, -1 for nowhere."""
    newest = (position < sinks) | (position > position[..., -1:] - window)
    inside = (position >= 0) & (position < max_tokens)
    return torch.where(newest & inside, exact_index(position, sinks, window), -1)


@torch.no_grad()
def kv_encode_pair(
    k_words: torch.Tensor,
    v_words: torch.Tensor,
    k_exact: torch.Tensor,
    v_exact: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: torch.Tensor,
    k_layout: KVLayout,
    v_layout: KVLayout,
    k_rotation: torch.Tensor | None = None,
    v_rotation: torch.Tensor | None = None,
    *,
    sinks: int,
    window: int,
    k_offset: torch.Tensor | None = None,
    k_gain: float = 1.0,
    effort: int = 1,
    dither: str | None = None,
    k_seed: int = 0,
    v_seed: int = 0,
    page_table: torch.Tensor | None = None,
) -> None:
    """`kv_encode` of the keys and the values of the same tokens.

    Args:
        k_words, k_exact, k, k_layout, k_rotation, k_offset, k_gain, k_seed: as `words` and so on of `kv_encode`; those of v alike.
        position, sinks, window, effort, dither, page_table: as for `kv_encode`.

    Raises:
        ValueError, TypeError: shapes, dtypes or rates do not fit together.
    """
    _check_words("k_words", k_words, k_layout)
    _check_words("v_words", v_words, v_layout)
    k = _rotated("k", k, k_layout, k_rotation, k_offset)
    v = _rotated("v", v, v_layout, v_rotation, None)
    tile = k_layout.tile
    scaled = k if k_gain == 1 else k * k_gain
    codes = tile.code, v_layout.tile.code
    torch.ops.hyperquant.kv_store_pair(
        k_words, v_words, scaled, v, position, tile.lattice, tile.tile, *codes, effort, dither, k_seed, v_seed, page_table
    )
    places = _exact_places(position, cache_shape(k_words, page_table)[1], sinks, window)
    write_rows(k_exact, places, k.to(k_exact.dtype))
    write_rows(v_exact, places, v.to(v_exact.dtype))


@torch.no_grad()
def kv_attention(
    query: torch.Tensor,
    k_words: torch.Tensor,
    v_words: torch.Tensor,
    k_exact: torch.Tensor,
    v_exact: torch.Tensor,
    length: torch.Tensor,
    k_layout: KVLayout,
    v_layout: KVLayout,
    k_rotation: torch.Tensor | None = None,
    v_rotation: torch.Tensor | None = None,
    *,
    sinks: int,
    window: int,
    start: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    sliding_window: int = 0,
    dither: str | None = None,
    k_seed: int = 0,
    v_seed: int = 0,
    page_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the newest tokens over a cache that `kv_encode` has written, theirs included.

    Args:
        query: `[B, Hq, S, head_dim]`, not rotated; the S newest tokens.
        k_words, v_words, k_exact, v_exact: as for `kv_encode`.
        length: int64 `[1]` on the device, or `[B]` of each row, tokens stored.
        start: int64 `[B]`, first position that counts (left padding), or None.
        mask: bool (true: seen) or added to the scores (-1e30 or less hides), `[B or 1, 1 or Hq, S, max_tokens or more]`, or None.
        scale: of the scores; None: `head_dim ** -0.5`.
        sliding_window: positions that a query sees, its own included; 0: all.
        page_table: as for `kv_encode`; tokens without a page are seen as long as they are exact.

    Returns:
        `[B, Hq, S, head_dim]`, dtype of `query`; zeros where nothing is seen.

    Raises:
        ValueError, TypeError: shapes, dtypes or rates do not fit together.
    """
    _check_words("k_words", k_words, k_layout)
    _check_words("v_words", v_words, v_layout)
    if query.shape[-1] != k_layout.head_dim:
        raise ValueError(f"query must have head_dim={k_layout.head_dim}, got {query.shape[-1]}")
    out = torch.ops.hyperquant.kv_attention(
        rotate(query, k_rotation),
        k_words,
        v_words,
        k_exact,
        v_exact,
        length,
        start,
        mask,
        query.shape[-1] ** -0.5 if scale is None else scale,
        sinks,
        window,
        sliding_window,
        k_layout.tile.lattice,
        k_layout.tile.tile,
        k_layout.tile.code,
        v_layout.tile.code,
        dither,
        k_seed,
        v_seed,
        page_table,
    )
    return rotate(out, None if v_rotation is None else v_rotation.t())
