"""The KV cache of one attention layer in pages, for rows that differ in length and come and go.

Definition.  A `QuantizedKV` whose slots lie in the pages of a `PageTable`, and whose rows each have a length. Exact tokens, at most
             `sinks + window` per row, are not paged.
Invariants.  Those of `QuantizedKV`. A token whose page is missing is refused where the host can tell; else (compiled, on CUDA) it has no
             slot, and is seen as long as it is exact.
"""

from __future__ import annotations

import torch

from ..format.kv import KVLayout, exact_index
from ..ops.kv import write_rows
from ..ops.paging import find_slots, gather_slots
from .config import KVConfig
from .page_table import PageTable
from .quantized_kv import MIN_CENTER_TOKENS, QuantizedKV


class PagedKV(QuantizedKV):
    """The keys and values of one attention layer, in pages.

    Args:
        config: how they are stored.
        pages: the page table, shared by the layers of a model; it gives batch, device and sizes.
        kv_heads, head_dim: of the keys and values.
        layer, sliding_window, dtype: as for `QuantizedKV`.

    Attributes:
        k_words, v_words: int32 `[num_pages, slots, page_size, words]`.
        length: int64 `[B]`, tokens stored.
        k_exact, v_exact, k_offset, start: as for `QuantizedKV`.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(
        self,
        config: KVConfig,
        pages: PageTable,
        kv_heads: int,
        head_dim: int,
        *,
        layer: int = 0,
        sliding_window: int = 0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.pages = pages
        batch, device = pages.entries.shape[0], pages.entries.device
        options = {"layer": layer, "sliding_window": sliding_window, "dtype": dtype, "device": device}
        super().__init__(config, batch, kv_heads, head_dim, pages.max_tokens, **options)

    def _blocks(self, batch: int) -> tuple[int, int, int]:
        return self.pages.num_pages, self.pages.page_size, batch

    @property
    def page_table(self) -> torch.Tensor:
        return self.pages.entries

    def _check_room(self, tokens: torch.Tensor | int) -> None:
        if self.length.is_cuda or torch.compiler.is_compiling():
            return
        after, size = self.length + tokens, self.pages.page_size
        if int(after.max()) > self.max_tokens:
            raise ValueError(f"the cache is full: max_tokens must be at least {int(after.max())}, got {self.max_tokens}")
        begin = torch.arange(self.pages.max_pages) * size
        written = (begin + size > self.length[:, None]) & (begin < after[:, None])
        missing = (written & ((self.page_table < 0) | (self.page_table >= self.pages.num_pages))).any(1)
        if missing.any():
            row = int(missing.to(torch.uint8).argmax())
            raise ValueError(f"row {row} must have pages for {int(after[row])} tokens: reserve them in the page table first")

    def store(self, k: torch.Tensor, v: torch.Tensor, tokens: torch.Tensor | None = None) -> None:
        """Append tokens to each row.

        Args:
            k, v: `[B, kv_heads, S, head_dim]`, floating point, k after the position embedding.
            tokens: int64 `[B]` on the device, how many of a row's S tokens are new: its last ones, what is before them is padding. None: S.

        Raises:
            ValueError, TypeError: they do not fit the cache, rows are full, or pages are missing; then nothing is written.
        """
        self._check(k, v)
        count = k.shape[2]
        if tokens is not None:
            if tokens.dtype != torch.int64 or tokens.shape != self.length.shape:
                raise ValueError(f"tokens must be int64 [{self.length.shape[0]}], got {tokens.dtype} {tuple(tokens.shape)}")
            tokens = tokens.clamp(0, count)
        new = torch.full_like(self.length, count) if tokens is None else tokens
        self._check_room(new)
        if count == 0:
            return
        place = torch.arange(count, device=self.length.device)
        real = place >= count - new[:, None]
        if self.config.center and count >= MIN_CENTER_TOKENS:
            mean = torch.where(real[:, None, :, None], k.detach(), 0).sum(2, keepdim=True, dtype=torch.float32)
            mean = mean / new.clamp(min=1)[:, None, None, None]
            first = (self.length == 0) & (new >= MIN_CENTER_TOKENS)
            self.k_offset.copy_(torch.where(first[:, None, None, None], mean, self.k_offset))
        self._write(k, v, torch.where(real, (self.length + new - count)[:, None] + place, -1))
        self.length.add_(new)

    @torch.no_grad()
    def crop(self, tokens: int | torch.Tensor) -> None:
        """Forget the newest tokens, a number of them or int64 `[B]` of each row; rows with fewer have none left. Pages stay reserved.

        Raises:
            ValueError: `tokens` is negative, where the host knows.
        """
        if not isinstance(tokens, torch.Tensor) and tokens < 0:
            raise ValueError(f"tokens must be at least 0, got {tokens}")
        sinks, window = self.config.sinks, self.config.window
        self.length.sub_(tokens).clamp_(min=0)
        place = torch.arange(window, device=self.length.device)
        # as in `QuantizedKV.crop`
        position = (self.length - window)[:, None] + place
        back = place < (tokens[:, None] if isinstance(tokens, torch.Tensor) else tokens)
        index = torch.where(back & (position >= sinks), exact_index(position, sinks, window), -1)
        for words, exact, layout, seed in self._sides():
            write_rows(exact, index, self._load_at(words, layout, seed, position)[:, : self.kv_heads])

    def _load_at(self, words: torch.Tensor, layout: KVLayout, seed: int, position: torch.Tensor) -> torch.Tensor:
        if self.config.dither is None:
            slots = gather_slots(words, *find_slots(position, words, self.page_table))
            return self._load(slots, layout, seed)
        states = self._load(words, layout, seed, self.page_table)
        return states.take_along_dim(position.clamp(0, self.max_tokens - 1)[:, None, :, None], 2)

    @torch.no_grad()
    def reset(self, row: int | None = None) -> None:
        """Forget all tokens, or those of one row. Pages stay with the row until the page table frees them."""
        rows = slice(None) if row is None else row
        self.length[rows].zero_()
        self.k_offset[rows].zero_()
        if row is None:
            self.start = None
        elif self.start is not None:
            self.start[rows].zero_()

    def reorder(self, index: torch.Tensor) -> None:
        """Not for pages."""
        raise NotImplementedError("rows of a paged cache cannot be reordered: their tokens would have to move to other pages")

    def select_batch(self, index: torch.Tensor) -> None:
        """Not for pages."""
        raise NotImplementedError("rows of a paged cache cannot be selected: reset and free those that end")
