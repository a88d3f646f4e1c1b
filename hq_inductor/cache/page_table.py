"""Which pages of the pools hold the tokens of each row.

Definition.  Row b keeps position p in page `entries[b, p // page_size]` (`hq_inductor.format.kv`). Every layer of a model has a pool, and
             all share one table. Pages are handed out from a list on the host, which knows how many tokens a step is about to add.
Invariants.  `entries` is changed in place, so a CUDA graph that reads it sees every change. No page is in two rows. When pages run out,
             nothing changes.
Source.      Kwon et al., arXiv 2309.06180 (PagedAttention).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops.paging import STEP_TOKENS


class PageTable:
    """A page table for a batch, and the pages that no row has.

    Args:
        batch: rows.
        num_pages: pages in each pool.
        page_size: tokens in a page, a power of two of at least 16.
        max_tokens: most tokens of a row, rounded up to whole pages.

    Attributes:
        entries: int32 `[batch, max_pages]`, -1 where there is no page. Write it yourself, and call neither `reserve` nor `free`, if pages
            come from an allocator of your own.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, batch: int, num_pages: int, page_size: int, max_tokens: int, device: torch.device | str = "cpu") -> None:
        for name, number in (("batch", batch), ("num_pages", num_pages), ("max_tokens", max_tokens)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if page_size < STEP_TOKENS or page_size & (page_size - 1):
            raise ValueError(f"page_size must be a power of two of at least {STEP_TOKENS}, got {page_size}")
        self.num_pages, self.page_size = num_pages, page_size
        self.max_pages = -(-max_tokens // page_size)
        with torch.inference_mode(False):
            self.entries = torch.full((batch, self.max_pages), -1, dtype=torch.int32, device=device)
        # the page that was given back last is the next to go
        self._free = list(range(num_pages - 1, -1, -1))
        self._rows: list[list[int]] = [[] for _ in range(batch)]

    @property
    def max_tokens(self) -> int:
        """Most tokens of a row."""
        return self.max_pages * self.page_size

    @property
    def free_pages(self) -> int:
        """Pages that no row has."""
        return len(self._free)

    def reserve(self, tokens: Sequence[int]) -> None:
        """Give each row the pages it still needs to hold `tokens[b]` tokens in all; rows keep what they have.

        Raises:
            ValueError: `tokens` has not one number for each row, a row would get longer than `max_tokens`, or there are not enough pages;
                then nothing changes.
        """
        if len(tokens) != len(self._rows):
            raise ValueError(f"tokens must have a number for each of {len(self._rows)} rows, got {len(tokens)}")
        if not all(0 <= count <= self.max_tokens for count in tokens):
            raise ValueError(f"tokens must be from 0 to max_tokens={self.max_tokens}, got {list(tokens)}")
        missing = [max(0, -(-count // self.page_size) - len(row)) for count, row in zip(tokens, self._rows, strict=True)]
        if sum(missing) > len(self._free):
            wanted = self.num_pages - len(self._free) + sum(missing)
            raise ValueError(f"pages have run out: num_pages must be at least {wanted}, got {self.num_pages}; free a row first")
        if not any(missing):
            return
        new = []
        for b, (row, count) in enumerate(zip(self._rows, missing, strict=True)):
            for _ in range(count):
                new.append((b, len(row), self._free[-1]))
                row.append(self._free.pop())
        # one copy that nobody waits for, whatever the number of rows
        place = torch.tensor(new, pin_memory=self.entries.is_cuda).to(self.entries.device, non_blocking=True)
        self.entries[place[:, 0], place[:, 1]] = place[:, 2].to(torch.int32)

    def free(self, row: int) -> None:
        """Take all pages of a row back; also `reset` the row in every cache.

        Raises:
            ValueError: there is no such row.
        """
        if not 0 <= row < len(self._rows):
            raise ValueError(f"row must be from 0 to {len(self._rows) - 1}, got {row}")
        self._free += reversed(self._rows[row])
        self._rows[row] = []
        self.entries[row].fill_(-1)
