"""Slots of a KV cache: one token's key or value of one head, or of few neighbouring heads, as one tile of a fixed size.

Definition.  A slot is one tile (`hq_inductor.format.layout`) of the rotated K or V of one token. Tiles are multiples of 128; where
             `head_dim` is none, `join` neighbouring heads share a tile, `join = lcm(head_dim, 128) / head_dim`: 1 for 128 and 256, 2 for
             64, 4 for 96, 8 for 80. Heads are padded with zeros to a multiple of `join`, and the padding counts.
Storage.     words: int32 `[B, ceil(kv_heads / join), max_tokens, W]`, `W = floor(bps * tile / 32)`: 4 bits per value are exactly a
             quarter of bf16. At tile 128 every 1/4 bit is one word, so eighths round down to it: a rate is never exceeded.
Pages.       Or a pool of them, int32 `[num_pages, ceil(kv_heads / join), page_size, W]`, and a table of pages, int32 `[B, max_pages]`:
             position p of row b lies at p % page_size of page `table[b, p // page_size]`, one block per head of slots. Entries that are
             no page (-1 is the usual one) have no slots: nothing is stored, and attention sees none of their tokens but exact ones.
Exact.       The first `sinks` tokens and the newest `window` are also kept as they are, `[B, kv_heads, sinks + window, head_dim]`: position
             p lies at p if `p < sinks`, else at `sinks + (p - sinks) % window`. All tokens are coded when they are written, so a token
             that leaves the window needs no work.
Entropy code. A tile of 128 pays 0.125 bits per value for its header, the 512 of the rate table 0.031, so the code made for a lower
             rate is the better one. Measured on N(0, 1), e8, effort 1, tiles 128, 256, 384 and 640, all word counts from 1.75 to 6 bits:
             the rate less the difference of the headers, rounded, is within 0.05 dB of the best key, but for the two exceptions below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .dither import check_dither, wide_code
from .layout import GROUP, HEADER_BITS, MAX_TILE, TileLayout
from .rate_table import RATE_TABLE
from .rates import PREFERRED_TILE, check_rate

# (tile, words): code for e8 where the rule loses 0.09 and 0.17 dB; both lie at a change of the Rice parameter
_EXCEPTIONS = {(256, 28): 27, (256, 46): 45}


def heads_per_slot(head_dim: int) -> int:
    """`join`, or `ValueError` if no tile holds whole heads of this size."""
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1 or math.lcm(head_dim, GROUP) > MAX_TILE:
        raise ValueError(
            f"head_dim must have a common multiple with {GROUP} of at most {MAX_TILE}, such as 64, 80, 96, 128, 256, got {head_dim!r}"
        )
    return math.lcm(head_dim, GROUP) // head_dim


def slot_code(tile: int, words: int, lattice: str) -> int:
    """Key of the rate table whose entropy code a slot of `words` words uses."""
    if lattice == "e8" and (tile, words) in _EXCEPTIONS:
        return _EXCEPTIONS[tile, words]
    bits = (32 * words - HEADER_BITS) / tile + HEADER_BITS / PREFERRED_TILE
    return min(max(round(8 * bits), min(RATE_TABLE[lattice])), max(RATE_TABLE[lattice]))


@dataclass(frozen=True)
class KVLayout:
    """How the keys, or the values, of one layer are stored.

    Attributes:
        head_dim: values per head.
        join: heads per slot.
        tile: layout of a slot.
    """

    head_dim: int
    join: int
    tile: TileLayout

    def slots(self, kv_heads: int) -> int:
        """Slots per token."""
        return -(-kv_heads // self.join)

    def bits_per_value(self, kv_heads: int) -> float:
        """Everything in the slots, padding included, per value of the original heads."""
        return 32 * self.tile.words * self.slots(kv_heads) / (kv_heads * self.head_dim)


def kv_layout(head_dim: int, bps: float, lattice: str = "e8", dither: str | None = None) -> KVLayout:
    """Layout of a cache with heads of `head_dim` values at a rate.

    Args:
        head_dim: values per head.
        bps: bits per value, everything in the slot included; a multiple of 1/8 from 1.75 (e8) or 2 to 6.
        lattice: one of `"e8"`, `"d4"`, `"a2"`, `"z"`.
        dither: None, `"half"` or `"full"`: which entropy code is best depends on it.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """
    check_rate(bps, lattice)
    check_dither(dither)
    join = heads_per_slot(head_dim)
    tile = join * head_dim
    words = int(tile * bps) // 32
    code = slot_code(tile, words, lattice)
    return KVLayout(head_dim, join, TileLayout(lattice, tile, code if dither is None else wide_code(lattice, code), words))


def unbiased_gain(layout: KVLayout) -> float:
    """What keys are multiplied by before they are coded, so that scores are right in the mean.

    Least-squares scales shrink: `<x, x'> = (1 - D) |x|^2` with D the relative error, 0.1 at 2 bits, and the softmax of shrunk scores is too
    flat. D is that of the Gaussian source at the rate of the entropy code (tile 512, effort 1), which is close to a slot's, as above.
    """
    return 1 / (1 - 10 ** (-RATE_TABLE[layout.tile.lattice][layout.tile.code].snr_db / 10))


def exact_index(position: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """Where positions lie in the exact buffers; -1 for positions that have no place there (negative, or `window` is 0).

    Args:
        position: int64, any shape.
    """
    ring = (position - sinks).remainder(window) + sinks if window else torch.full_like(position, -1)
    return torch.where(position < sinks, position.clamp(min=-1), ring)


def join_heads(x: torch.Tensor, join: int) -> torch.Tensor:
    """`[B, heads, S, head_dim]` to `[B, slots, S, join * head_dim]`, missing heads zero."""
    batch, heads, tokens, head_dim = x.shape
    if join == 1:
        return x
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -heads % join))
    return x.unflatten(1, (-1, join)).transpose(2, 3).reshape(batch, -1, tokens, join * head_dim)


def split_heads(x: torch.Tensor, join: int) -> torch.Tensor:
    """Inverse of `join_heads`, padding heads included: `[B, slots, S, join * head_dim]` to `[B, slots * join, S, head_dim]`."""
    return x if join == 1 else x.unflatten(-1, (join, -1)).transpose(2, 3).flatten(1, 2)
