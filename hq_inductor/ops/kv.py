"""`hyperquant::kv_store`, `kv_store_pair` and `kv_load`: rotated keys or values to the slots of a cache and back.

Definition.  `kv_store` codes tokens at given positions in place, `kv_store_pair` keys and values of the same tokens, `kv_load` decodes all
             positions. `hq_inductor.format.kv` has the storage, `hq_inductor.ops.attention` the attention that reads it.
Pages.       With a page table, words are a pool (`hq_inductor.ops.paging`); without a page, nothing is stored and zeros are loaded.
Invariants.  No host sync. Positions outside the cache are not written. Any words are read without error; corrupt ones give wrong finite
             numbers, and so do corrupt page tables.
Choice.      On CUDA `kv_load` is the decode kernel and `kv_store`, for e8 and efforts 0 and 1, the encode kernel of
             `hq_inductor.ops.fused_kv`, one launch for a pair of one rate: a launch for one token takes several microseconds whatever its
             size. Other lattices, effort 2 and dither (`hq_inductor.format.dither`) are plain PyTorch everywhere.
"""

from __future__ import annotations

import torch

from ..format.dither import check_dither, dither_vectors, quantize_dithered
from ..format.kv import join_heads, split_heads
from ..format.lattice import embed
from ..format.layout import TileLayout
from ..format.quantizer import check_effort, quantize_tiles
from ..format.rate_table import RATE_TABLE
from ..format.rice import encode_tiles
from .decode import decode_words
from .paging import cache_shape, check_page_table, find_slots, gather_pages
from .registry import check_floating, register, tile_layout

# a prompt is coded in blocks of about this many values, which bounds the memory beside it
_BLOCK_VALUES = {"cpu": 1 << 18, "cuda": 1 << 24}
# CUDA's limit to the second dimension of a grid is 65535
_STORE_TOKENS = 1 << 15


def check_words(name: str, words: torch.Tensor, lattice: str, tile: int, code: int) -> TileLayout:
    """The layout of slots `[B, slots, max_tokens, W]`, or `TypeError` / `ValueError`."""
    if words.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {words.dtype}")
    if words.dim() != 4:
        raise ValueError(f"{name} must be [B, slots, max_tokens, words], got shape {tuple(words.shape)}")
    return tile_layout(lattice, tile, code, int(words.shape[-1]))


def slot_heads(tile: int, head_dim: int) -> int:
    """Heads per slot, or `ValueError`."""
    if head_dim < 1 or tile % head_dim:
        raise ValueError(f"head_dim must divide tile={tile}, got {head_dim}")
    return tile // head_dim


def write_rows(target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """`target[:, :, index] = rows` in place, without host sync; indices out of range are skipped, others must differ.

    Args:
        target: `[B, H, N, D]`.
        index: int64 `[S]`, or `[B, S]`: of each row of the batch.
        rows: `[B, H, S, D]`.
    """
    if index.dim() == 2:
        block = torch.arange(index.shape[0], device=index.device)[:, None].expand(index.shape)
        return scatter_rows(target, block, index, rows)
    size, tokens = target.shape[2], index.shape[0]
    valid = (index >= 0) & (index < size)
    if tokens == 1:
        place = index.clamp(0, size - 1)
        target.index_copy_(2, place, torch.where(valid[:, None], rows, target.index_select(2, place)))
        return
    # which row each place takes; one place more catches what is out of range
    arrival = torch.arange(tokens, device=index.device)
    source = torch.full((size + 1,), -1, device=index.device).scatter(0, torch.where(valid, index, size), arrival)[:size]
    target.copy_(torch.where(source[:, None] >= 0, rows.index_select(2, source.clamp(min=0)), target))


def scatter_rows(target: torch.Tensor, block: torch.Tensor, place: torch.Tensor, rows: torch.Tensor) -> None:
    """`target[block[b, s], :, place[b, s]] = rows[b, :, s]` in place, as `write_rows`.

    Args:
        target: `[R, H, N, D]`.
        block, place: int64 `[B, S]`.
        rows: `[B, H, S, D]`.
    """
    if rows.numel() == 0 or target.numel() == 0:
        return
    block, place = block.flatten(), place.flatten()
    valid = (block >= 0) & (block < target.shape[0]) & (place >= 0) & (place < target.shape[2])
    # what is skipped writes once more what another writes, or if all are skipped what is there
    source = torch.where(valid, torch.arange(len(valid), device=valid.device), valid.to(torch.uint8).argmax())
    block, place = torch.where(valid, block, 0)[source], torch.where(valid, place, 0)[source]
    rows = rows.transpose(1, 2).flatten(0, 1)[source]
    target[block, :, place] = torch.where(valid.any(), rows, target[block, :, place])


def _check_store(words, x, position, lattice, tile, code, effort, dither, page_table) -> TileLayout:
    layout = check_words("words", words, lattice, tile, code)
    if page_table is not None:
        check_page_table(page_table, words)
    batch, _ = cache_shape(words, page_table)
    check_floating("x", x)
    check_effort(effort)
    check_dither(dither)
    if x.dim() != 4 or x.shape[0] != batch:
        raise ValueError(f"x must be [B, heads, S, head_dim] with B={batch}, got shape {tuple(x.shape)}")
    join = slot_heads(tile, x.shape[3])
    if -(-x.shape[1] // join) != words.shape[1]:
        raise ValueError(f"x must have heads for {words.shape[1]} slots of {join}, got {x.shape[1]} heads")
    if position.dtype != torch.int64 or tuple(position.shape) not in ((x.shape[2],), (batch, x.shape[2])):
        expected = f"[{x.shape[2]}] or [{batch}, {x.shape[2]}]"
        raise ValueError(f"position must be int64 {expected}, got {position.dtype} {tuple(position.shape)}")
    return layout


def _dither_of(dither: str, seed: int, shape: torch.Size, position: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """Dither of tiles `[B, slots, S, tile]` at positions `[S]` or `[B, S]`."""
    batch, slots, tokens, tile = shape
    vectors = dither_vectors(dither, seed, slots, position.flatten(), layout)
    if position.dim() == 1:
        return vectors.expand(shape)
    return vectors.view(slots, batch, tokens, tile).transpose(0, 1)


def _kv_store(
    words: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    lattice: str,
    tile: int,
    code: int,
    effort: int,
    dither: str | None = None,
    seed: int = 0,
    page_table: torch.Tensor | None = None,
) -> None:
    layout = _check_store(words, x, position, lattice, tile, code, effort, dither, page_table)
    if x.numel() == 0:
        return
    tiles = join_heads(x, tile // x.shape[3]).to(torch.float32)
    shape, flat = tiles.shape, tiles.reshape(-1, tile)
    start_rms = RATE_TABLE[lattice][code].start_rms
    u = None if dither is None else _dither_of(dither, seed, shape, position, layout).reshape(-1, tile)
    coded = words.new_empty((flat.shape[0], layout.words))
    step = max(1, _BLOCK_VALUES[x.device.type] // tile)
    for begin in range(0, flat.shape[0], step):
        rows = slice(begin, begin + step)
        if u is None:
            codes, scale = quantize_tiles(flat[rows], layout, start_rms, effort)
        else:
            codes, scale = quantize_dithered(flat[rows], u[rows], layout, start_rms, dither)
        coded[rows] = encode_tiles(codes, scale, layout)
    coded = coded.view(*shape[:3], -1)
    if page_table is None:
        write_rows(words, position, coded)
    else:
        scatter_rows(words, *find_slots(position, words, page_table), coded)


def _takes_kernel(words: torch.Tensor, x: torch.Tensor, lattice: str, effort: int, dither: str | None) -> bool:
    kernel = lattice == "e8" and effort < 2 and dither is None and x.dtype != torch.float64 and x.shape[3] % 8 == 0
    return kernel and words.is_contiguous()


def _kv_store_cuda(
    words: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    lattice: str,
    tile: int,
    code: int,
    effort: int,
    dither: str | None = None,
    seed: int = 0,
    page_table: torch.Tensor | None = None,
) -> None:
    layout = _check_store(words, x, position, lattice, tile, code, effort, dither, page_table)
    if not _takes_kernel(words, x, lattice, effort, dither):
        return _kv_store(words, x, position, lattice, tile, code, effort, dither, seed, page_table)
    from .fused_kv import store  # Triton is there on Linux only, and takes its time to import

    # a launch takes so many tokens
    for x_part, position_part in zip(x.split(_STORE_TOKENS, 2), position.split(_STORE_TOKENS, -1), strict=True):
        store(words, x_part, position_part.contiguous(), layout, effort, page_table=page_table)


def _kv_store_fake(words, x, position, lattice, tile, code, effort, dither=None, seed=0, page_table=None) -> None:
    _check_store(words, x, position, lattice, tile, code, effort, dither, page_table)


register(
    "kv_store(Tensor(a!) words, Tensor x, Tensor position, str lattice, int tile, int code, int effort, str? dither=None, "
    "int seed=0, Tensor? page_table=None) -> ()",
    _kv_store_fake,
    replay=True,
    CPU=_kv_store,
    CUDA=_kv_store_cuda,
)


def _check_pair(
    k_words, v_words, k, v, position, lattice, tile, k_code, v_code, effort, dither, page_table
) -> tuple[TileLayout, TileLayout]:
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    return (
        _check_store(k_words, k, position, lattice, tile, k_code, effort, dither, page_table),
        _check_store(v_words, v, position, lattice, tile, v_code, effort, dither, page_table),
    )


def _kv_store_pair(
    k_words: torch.Tensor,
    v_words: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: torch.Tensor,
    lattice: str,
    tile: int,
    k_code: int,
    v_code: int,
    effort: int,
    dither: str | None = None,
    k_seed: int = 0,
    v_seed: int = 0,
    page_table: torch.Tensor | None = None,
) -> None:
    _check_pair(k_words, v_words, k, v, position, lattice, tile, k_code, v_code, effort, dither, page_table)
    _kv_store(k_words, k, position, lattice, tile, k_code, effort, dither, k_seed, page_table)
    _kv_store(v_words, v, position, lattice, tile, v_code, effort, dither, v_seed, page_table)


def _kv_store_pair_cuda(
    k_words: torch.Tensor,
    v_words: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: torch.Tensor,
    lattice: str,
    tile: int,
    k_code: int,
    v_code: int,
    effort: int,
    dither: str | None = None,
    k_seed: int = 0,
    v_seed: int = 0,
    page_table: torch.Tensor | None = None,
) -> None:
    k_layout, v_layout = _check_pair(k_words, v_words, k, v, position, lattice, tile, k_code, v_code, effort, dither, page_table)
    kernel = all(_takes_kernel(words, x, lattice, effort, dither) for words, x in ((k_words, k), (v_words, v)))
    if not kernel or k_layout != v_layout or k.dtype != v.dtype:
        _kv_store_cuda(k_words, k, position, lattice, tile, k_code, effort, dither, k_seed, page_table)
        return _kv_store_cuda(v_words, v, position, lattice, tile, v_code, effort, dither, v_seed, page_table)
    from .fused_kv import store  # Triton is there on Linux only, and takes its time to import

    # a launch takes so many tokens
    parts = (k.split(_STORE_TOKENS, 2), v.split(_STORE_TOKENS, 2), position.split(_STORE_TOKENS, -1))
    for k_part, v_part, position_part in zip(*parts, strict=True):
        store(k_words, k_part, position_part.contiguous(), k_layout, effort, page_table=page_table, other=(v_words, v_part))


def _kv_store_pair_fake(
    k_words, v_words, k, v, position, lattice, tile, k_code, v_code, effort, dither=None, k_seed=0, v_seed=0, page_table=None
) -> None:
    _check_pair(k_words, v_words, k, v, position, lattice, tile, k_code, v_code, effort, dither, page_table)


register(
    "kv_store_pair(Tensor(a!) k_words, Tensor(b!) v_words, Tensor k, Tensor v, Tensor position, str lattice, int tile, int k_code, "
    "int v_code, int effort, str? dither=None, int k_seed=0, int v_seed=0, Tensor? page_table=None) -> ()",
    _kv_store_pair_fake,
    replay=True,
    CPU=_kv_store_pair,
    CUDA=_kv_store_pair_cuda,
)


def _check_load(words, head_dim, lattice, tile, code, dtype, dither, page_table) -> TileLayout:
    layout = check_words("words", words, lattice, tile, code)
    if page_table is not None:
        check_page_table(page_table, words)
    slot_heads(tile, head_dim)
    check_dither(dither)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    return layout


def load(words: torch.Tensor, head_dim: int, layout: TileLayout, dtype: torch.dtype, dither: str | None, seed: int) -> torch.Tensor:
    """`kv_load` with a layout."""
    batch, slots, tokens, count = words.shape
    flat = words.reshape(-1, 1, count)
    if words.is_cuda and dither is None:
        from .fused import decode  # Triton is there on Linux only

        values, _ = decode(flat.contiguous(), layout, dtype)
    else:
        codes, scale = decode_words(flat, layout)
        values = embed(codes, layout.lattice).view(batch, slots, tokens, layout.tile)
        if dither is not None:
            values = values - dither_vectors(dither, seed, slots, torch.arange(tokens, device=words.device), layout)
        values = values * scale.view(batch, slots, tokens, 1)
    if dtype == torch.float16:
        # corrupt scales reach further than this type
        values = values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return split_heads(values.to(dtype).view(batch, slots, tokens, layout.tile), layout.tile // head_dim).contiguous()


def _kv_load(
    words: torch.Tensor,
    head_dim: int,
    lattice: str,
    tile: int,
    code: int,
    dtype: torch.dtype,
    dither: str | None = None,
    seed: int = 0,
    page_table: torch.Tensor | None = None,
) -> torch.Tensor:
    layout = _check_load(words, head_dim, lattice, tile, code, dtype, dither, page_table)
    if page_table is None:
        return load(words, head_dim, layout, dtype, dither, seed)
    ordered, there = gather_pages(words, page_table)
    return torch.where(there[:, None, :, None], load(ordered, head_dim, layout, dtype, dither, seed), 0)


def _kv_load_fake(words, head_dim, lattice, tile, code, dtype, dither=None, seed=0, page_table=None):
    _check_load(words, head_dim, lattice, tile, code, dtype, dither, page_table)
    batch, tokens = cache_shape(words, page_table)
    return words.new_empty((batch, words.shape[1] * (tile // head_dim), tokens, head_dim), dtype=dtype)


register(
    "kv_load(Tensor words, int head_dim, str lattice, int tile, int code, ScalarType dtype, str? dither=None, int seed=0, "
    "Tensor? page_table=None) -> Tensor",
    _kv_load_fake,
    CPU=_kv_load,
    CUDA=_kv_load,
)
