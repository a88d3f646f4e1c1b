"""The KV cache of one attention layer.

Definition.  `QuantizedKV` holds slots, exact tokens and their number, and calls `kv_encode_pair` and `kv_attention`
             (`hq_inductor.cache.functional`).
Invariants.  All tensors are allocated once and changed in place; the number of tokens is a tensor on the device. So a step has static
             shapes, needs no host sync, and compiles into one graph or a CUDA graph. What does not fit is refused before anything is
             written; where lengths are unknown to the host (compiled, or on CUDA after compiled steps), tokens beyond the end are dropped.
Why an offset.  Keys of one head share a large constant part, which costs bits and decides nothing: adding one vector to all keys adds one
             number to all scores of a query. So the mean of the first tokens is subtracted from all keys that are stored, exactly. On a
             24M-parameter Llama this lowers the divergence at 2 bits by a quarter; for values, it was measured to do nothing.
Why a gain.   Least-squares scales make coded keys too short, by a tenth at 2 bits, and attention too flat. Keys are coded longer by as
             much: on that Llama at 2 bits this takes the divergence to a third.
Why exact tokens.  Attention looks most at the first tokens and at the newest. Sixty-eight of them in bf16 are little beside thousands.
"""

from __future__ import annotations

import torch

from ..format.kv import KVLayout, exact_index, kv_layout, unbiased_gain
from ..format.rotation import role_seed, rotation_matrix
from ..ops.attention import merge_exact
from ..ops.kv import write_rows
from ..ops.paging import STEP_TOKENS
from .config import KVConfig
from .functional import kv_attention, kv_encode_pair, rotate

# caches hold a multiple of this many tokens
TOKEN_BLOCK = STEP_TOKENS
# fewer tokens than this say little about the mean of all
MIN_CENTER_TOKENS = 16


class QuantizedKV:
    """The keys and values of one attention layer.

    Args:
        config: how they are stored.
        batch, kv_heads, head_dim: of the keys and values.
        max_tokens: tokens that fit, rounded up to a multiple of 16.
        layer: index of the layer, for its rotations and dither.
        sliding_window: positions that a query sees, its own included; 0: all. Older tokens are kept.
        dtype: of the exact tokens.

    Attributes:
        k_words, v_words: int32 `[B, slots, max_tokens, words]`.
        k_exact, v_exact: `[B, kv_heads, sinks + window, head_dim]`, rotated.
        k_offset: `[B, kv_heads, 1, head_dim]` fp32, what was subtracted from the keys.
        length: int64 `[1]`, tokens stored.
        start: int64 `[B]`, first position of each row that counts; None: 0. Set it for left-padded batches.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(
        self,
        config: KVConfig,
        batch: int,
        kv_heads: int,
        head_dim: int,
        max_tokens: int,
        *,
        layer: int = 0,
        sliding_window: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, number in (("batch", batch), ("kv_heads", kv_heads), ("max_tokens", max_tokens)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point, got {dtype}")
        self.config, self.layer, self.sliding_window = config, layer, sliding_window
        self.k_layout = kv_layout(head_dim, config.k_bps, config.lattice, config.dither)
        self.v_layout = kv_layout(head_dim, config.v_bps, config.lattice, config.dither)
        self.k_gain = unbiased_gain(self.k_layout) if config.unbias and config.dither is None else 1.0
        self.max_tokens = -(-max_tokens // TOKEN_BLOCK) * TOKEN_BLOCK
        self.kv_heads, self.head_dim = kv_heads, head_dim
        # ordinary tensors, also where a first call under inference mode allocates them
        blocks, tokens, lengths = self._blocks(batch)
        with torch.inference_mode(False):
            self.k_words, self.v_words = (
                torch.zeros(blocks, layout.slots(kv_heads), tokens, layout.tile.words, dtype=torch.int32, device=device)
                for layout in (self.k_layout, self.v_layout)
            )
            shape = (batch, kv_heads, config.sinks + config.window, head_dim)
            self.k_exact, self.v_exact = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self.k_offset = torch.zeros(batch, kv_heads, 1, head_dim, dtype=torch.float32, device=device)
            self.length = torch.zeros(lengths, dtype=torch.int64, device=device)
        self.start: torch.Tensor | None = None
        self._centered = not config.center
        # a lower bound of the length: steps that are compiled do not count
        self._counted = 0
        rotations = (
            None
            if config.rotation == "none"
            else rotation_matrix(config.rotation, head_dim, config.seed, layer, role, self.length.device, dtype)
            for role in ("k", "v")
        )
        self.k_rotation, self.v_rotation = rotations
        self.k_seed, self.v_seed = (role_seed(config.seed, layer, role) for role in ("k", "v"))

    def _blocks(self, batch: int) -> tuple[int, int, int]:
        """Blocks of slots, tokens in each, and lengths."""
        return batch, self.max_tokens, 1

    @property
    def page_table(self) -> torch.Tensor | None:
        """int32 `[B, max_pages]` if slots lie in pages, else None."""
        return None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name. None of them is ever replaced but by `select_batch`."""
        return {name: getattr(self, name) for name in ("k_words", "v_words", "k_exact", "v_exact", "k_offset", "length")}

    @property
    def size_bytes(self) -> int:
        """Bytes of slots, exact tokens and the offset."""
        return sum(t.numel() * t.element_size() for name, t in self.tensors().items() if name != "length")

    @property
    def slot_bits_per_value(self) -> float:
        """Bits per key or value of the slots alone, padding of heads included."""
        return (self.k_layout.bits_per_value(self.kv_heads) + self.v_layout.bits_per_value(self.kv_heads)) / 2

    def _check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        batch = self.k_exact.shape[0]
        for name, x in (("k", k), ("v", v)):
            if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, self.kv_heads, self.head_dim) or x.shape != k.shape:
                wanted = f"[{batch}, {self.kv_heads}, S, {self.head_dim}]"
                raise ValueError(f"{name} must have shape {wanted}, the same as the other, got {tuple(x.shape)}")
            if not x.dtype.is_floating_point:
                raise TypeError(f"{name} must be floating point, got {x.dtype}")
            if x.device != self.length.device:
                raise ValueError(f"{name} must be on {self.length.device}, where the cache is, got {x.device}")

    def _check_room(self, tokens: int) -> None:
        stored = 0 if torch.compiler.is_compiling() else int(self.length) if not self.length.is_cuda else self._counted
        if stored + tokens > self.max_tokens:
            raise ValueError(f"the cache is full: max_tokens must be at least {stored + tokens}, got {self.max_tokens}")

    def store(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append tokens.

        Args:
            k, v: `[B, kv_heads, S, head_dim]`, floating point, k after the position embedding.

        Raises:
            ValueError, TypeError: they do not fit the cache, or the cache is full; then nothing is written.
        """
        self._check(k, v)
        tokens = k.shape[2]
        self._check_room(tokens)
        if tokens == 0:
            return
        if not self._centered:
            self._centered = True
            if tokens >= MIN_CENTER_TOKENS:
                self.k_offset.copy_(k.detach().mean(2, keepdim=True, dtype=torch.float32))
        self._write(k, v, self.length + torch.arange(tokens, device=self.length.device))
        self.length.add_(tokens)
        if not torch.compiler.is_compiling():
            self._counted += tokens

    def _write(self, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor) -> None:
        """`kv_encode_pair`, at positions `[S]` or `[B, S]`."""
        config = self.config
        kv_encode_pair(
            self.k_words,
            self.v_words,
            self.k_exact,
            self.v_exact,
            k,
            v,
            position,
            self.k_layout,
            self.v_layout,
            self.k_rotation,
            self.v_rotation,
            sinks=config.sinks,
            window=config.window,
            k_offset=self.k_offset if config.center else None,
            k_gain=self.k_gain,
            effort=config.effort,
            dither=config.dither,
            k_seed=self.k_seed,
            v_seed=self.v_seed,
            page_table=self.page_table,
        )

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None) -> torch.Tensor:
        """Attention of the S newest tokens, `[B, Hq, S, head_dim]`; arguments as of `kv_attention`."""
        return kv_attention(
            query,
            self.k_words,
            self.v_words,
            self.k_exact,
            self.v_exact,
            self.length,
            self.k_layout,
            self.v_layout,
            self.k_rotation,
            self.v_rotation,
            sinks=self.config.sinks,
            window=self.config.window,
            start=self.start,
            mask=mask,
            scale=scale,
            sliding_window=self.sliding_window,
            dither=self.config.dither,
            k_seed=self.k_seed,
            v_seed=self.v_seed,
            page_table=self.page_table,
        )

    def _load(self, words: torch.Tensor, layout: KVLayout, seed: int, page_table: torch.Tensor | None = None) -> torch.Tensor:
        key, dtype = (layout.tile.lattice, layout.tile.tile, layout.tile.code), self.k_exact.dtype
        return torch.ops.hyperquant.kv_load(words, self.head_dim, *key, dtype, self.config.dither, seed, page_table)

    def _sides(self) -> tuple[tuple[torch.Tensor, torch.Tensor, KVLayout, int], ...]:
        """Words, exact tokens, layout and seed of keys and of values."""
        return (self.k_words, self.k_exact, self.k_layout, self.k_seed), (self.v_words, self.v_exact, self.v_layout, self.v_seed)

    @torch.no_grad()
    def _dequantize(
        self, words: torch.Tensor, exact: torch.Tensor, layout: KVLayout, rotation: torch.Tensor | None, seed: int
    ) -> torch.Tensor:
        states = self._load(words, layout, seed, self.page_table)
        states = merge_exact(states, exact, self.length, self.config.sinks, self.config.window)
        return rotate(states, None if rotation is None else rotation.t())

    def keys(self) -> torch.Tensor:
        """Keys of all positions, not rotated, `[B, kv_heads, max_tokens, head_dim]`; those beyond `length` are arbitrary."""
        keys = self._dequantize(self.k_words, self.k_exact, self.k_layout, self.k_rotation, self.k_seed)
        return (keys + self.k_offset).to(keys.dtype)

    def values(self) -> torch.Tensor:
        """Values of all positions, as `keys`."""
        return self._dequantize(self.v_words, self.v_exact, self.v_layout, self.v_rotation, self.v_seed)

    def dequantize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`keys()` and `values()`."""
        return self.keys(), self.values()

    @torch.no_grad()
    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens` tokens. Tokens that come back into the window are exact no more: their slots are decoded.

        Raises:
            ValueError: `tokens` is negative, or more than are stored, where the host knows.
        """
        if tokens < 0 or (not self.length.is_cuda and tokens > int(self.length)):
            raise ValueError(f"tokens must be from 0 to the {int(self.length)} stored, got {tokens}")
        sinks, window = self.config.sinks, self.config.window
        self.length.sub_(tokens).clamp_(min=0)
        self._counted = max(0, self._counted - tokens)
        returning = min(tokens, window)
        if returning == 0:
            return
        # the window's oldest, whose places the forgotten tokens took; sinks were never overwritten
        position = self.length - window + torch.arange(returning, device=self.length.device)
        index = torch.where(position >= sinks, exact_index(position, sinks, window), -1)
        for words, exact, layout, seed in self._sides():
            # dither is keyed by position: decoding all of them is the plain way to it
            kept = position.clamp(0, self.max_tokens - 1)
            if self.config.dither is None:
                states = self._load(words.index_select(2, kept), layout, seed)
            else:
                states = self._load(words, layout, seed).index_select(2, kept)
            write_rows(exact, index, states[:, : self.kv_heads])

    @torch.no_grad()
    def reorder(self, index: torch.Tensor) -> None:
        """Row b becomes what row `index[b]` was, int64 `[B]`, in place (beam search)."""
        index = index.to(self.length.device)
        for name, tensor in self.tensors().items():
            if name != "length":
                tensor.copy_(tensor.index_select(0, index))
        if self.start is not None:
            self.start = self.start.index_select(0, index)

    @torch.no_grad()
    def select_batch(self, index: torch.Tensor) -> None:
        """As `reorder`, with any number of rows: allocates new tensors."""
        index = index.to(self.length.device)
        for name, tensor in self.tensors().items():
            if name != "length":
                setattr(self, name, tensor.index_select(0, index))
        if self.start is not None:
            self.start = self.start.index_select(0, index)

    def reset(self) -> None:
        """Forget all tokens."""
        self.length.zero_()
        self.k_offset.zero_()
        self.start, self._counted, self._centered = None, 0, not self.config.center
