"""Pages of a cache: slots in blocks of a pool, which a table finds (`hq_inductor.format.kv`).

Invariants.  No host sync. Entries of a table that are no page of the pool are never followed: nothing is written there, and what is read is
             zeros that count as absent.
Choice.      The kernels of `hq_inductor.ops.fused_kv` follow the table themselves. Everything else works on a copy of the coded slots in
             order, a fraction of what they decode to.
"""

from __future__ import annotations

import torch

# tokens that kernels read at a time; they lie in one page
STEP_TOKENS = 16


def check_page_table(page_table: torch.Tensor, words: torch.Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless `page_table` is int32 `[B, max_pages]` and `words` a pool with pages."""
    if page_table.dtype != torch.int32:
        raise TypeError(f"page_table must be int32, got {page_table.dtype}")
    if page_table.dim() != 2 or page_table.shape[1] < 1:
        raise ValueError(f"page_table must be [B, max_pages] with at least one page, got shape {tuple(page_table.shape)}")
    if words.shape[0] < 1 or words.shape[2] < 1:
        raise ValueError(f"words must be [num_pages, slots, page_size, words] with at least one slot, got shape {tuple(words.shape)}")


def cache_shape(words: torch.Tensor, page_table: torch.Tensor | None) -> tuple[int, int]:
    """Rows of the batch and the tokens that each can hold."""
    if page_table is None:
        return words.shape[0], words.shape[2]
    return page_table.shape[0], page_table.shape[1] * words.shape[2]


def find_slots(position: torch.Tensor, words: torch.Tensor, page_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and place in it of positions, int64 `[B, S]`; the page is -1 where there is none.

    Args:
        position: int64 `[S]` or `[B, S]`.
        words: the pool, `[num_pages, slots, page_size, W]`.
        page_table: int32 `[B, max_pages]`.
    """
    num_pages, _, page_size, _ = words.shape
    position = position.expand(page_table.shape[0], -1)
    inside = (position >= 0) & (position < page_table.shape[1] * page_size)
    position = torch.where(inside, position, 0)
    page = page_table.gather(1, position // page_size).to(torch.int64)
    return torch.where(inside & (page >= 0) & (page < num_pages), page, -1), position % page_size


def gather_slots(words: torch.Tensor, page: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Slots `[B, slots, S, W]` of pages and places `[B, S]` (`find_slots`), zeros where there is no page."""
    found = torch.where((page >= 0)[:, :, None, None], words[page.clamp(min=0), :, place], 0)
    return found.transpose(1, 2)


def gather_pages(words: torch.Tensor, page_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots in the order of positions, and which positions have one.

    Returns:
        `[B, slots, max_tokens, W]`, zeros where there is no page, and bool `[B, max_tokens]`; `max_tokens` is `max_pages * page_size`.
    """
    num_pages, slots, page_size, count = words.shape
    batch, max_pages = page_table.shape
    there = (page_table >= 0) & (page_table < num_pages)
    pages = words[page_table.clamp(0, num_pages - 1)]
    pages = torch.where(there[:, :, None, None, None], pages, 0)
    ordered = pages.transpose(1, 2).reshape(batch, slots, max_pages * page_size, count)
    return ordered, there.repeat_interleave(page_size, 1)
