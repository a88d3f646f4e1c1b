"""The tile: how the lattice codes of `tile` consecutive coefficients of one row lie in a fixed number of 32-bit words.

Definition.  A weight `[N, K]` is stored as `qdata`, int32 `[N, K / tile, words]`: rows first, so rows slice anywhere and columns
             slice at tile boundaries with a plain `narrow`. Every tile takes exactly `words` words, its scale included:
             `bits_per_weight = 32 * words / tile`.

Storage.     words = [ raw plane | stream plane ]

             Raw plane, Rice parameter k >= 1. Coefficient `128 g + 32 v + 8 j + 4 h + i` of the tile is symbol `4 h + i` of the vector
             that lane j (0..3) decodes as number v (0..3) in group g. Of each group a lane owns k words. In every one of them the symbols
             0,4 stand in byte 0, 1,5 in byte 1, 2,6 in byte 2 and 3,7 in byte 3, so `(word >> place) & mask` is one field of four
             neighbouring coefficients, a byte each: what the int8 MMA reads. In order:

               signs                                one bit at `place = 4 (v % 2) + 2 h + v / 2` of each byte
               low bits of the one's-complement magnitudes, two at a time from the lowest:
                 a pair: two words, v / 2           two bits at `place = 4 (v % 2) + 2 h`
                 the last one of an odd number      one bit at the signs' place

             Word i = k g + w of a lane stands at `16 (i / 4) + 4 j + i % 4`, and if the number of words is no multiple of 4, the last r
             words of each lane at `r j + i % 4` after those: 16-byte loads of a lane, 64 bytes of four.
             E8: the sign of a vector's last symbol is implied by the even sum; its place holds the coset bit.
             D4: the sign of every fourth symbol (byte 3) is implied; lane 3's three remaining bytes of that word fill the free bytes of
             lanes 0, 1, 2, and its own word is not stored. Its words stand group by group and lane by lane.

             Stream plane: bits counted from the most significant bit of its first word.

               0        12     16                           wall                       end
               | scale  | wall | lane 0 ->        <- lane 1 | lane 2 ->      <- lane 3 |

             `scale`: 6 exponent and 6 mantissa bits, no sign, `2^(e - 40) (1 + m / 64)`: finite for all 4096 codes.
             `wall`: 4 bits; the middle wall stands `wall_unit * (code - 8)` bits from the centre.
             Each lane writes the Huffman codes (`hq_inductor.format.quotient_code`) of its `tile / 16` quads of quotients in the
             direction of
             its arrow, every code with its most significant bit first in that direction. Two lanes share a region from both ends, so
             neither start offsets nor a fixed quarter each have to be paid for; unused bits are zero.

Invariants.  Encoders guarantee that both regions hold their lanes' codes and that quotients are below `classes`. Decoders may rely on
             neither for memory safety. A vector's codes take at most 24 bits, whatever the words hold: one 32-bit window reads a vector.

Cost.        16 header bits per tile: 0.031 bits per weight at tile 512. Measured on N(0, 1) at 4 bps, tile 512: the movable wall
             loses under 0.01 dB against one serial stream; four fixed quarters would lose 0.55 dB.

Source.      HyperQuant, arXiv 2606.23406 (Rice coding and bit-stripping). Differs in: constant rate per tile, split planes, four lanes,
             Huffman-coded instead of unary quotients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .on_device import on_device
from .quotient_code import QUAD, TABLE_BITS, QuotientCode, quotient_code
from .rate_table import RATE_TABLE, Rate

FORMAT_VERSION = 3
LATTICES = ("e8", "d4", "a2", "z")

GROUP = 128  # coefficients whose raw bits interleave: 4 lanes x 4 vectors x 8 symbols
LANES = 4
VECTOR = 8
HEADER_BITS = 16
MAX_TILE = 1536
MAX_VECTOR_BITS = VECTOR // QUAD * TABLE_BITS

SCALE_MANTISSA_BITS = 6
SCALE_CODES = 1 << 12
_SCALE_SHIFT = 23 - SCALE_MANTISSA_BITS
_SCALE_BIAS = (127 - 40) << SCALE_MANTISSA_BITS
MIN_SCALE = 2.0**-40
MAX_SCALE = 2.0**23 * (2 - 2.0**-SCALE_MANTISSA_BITS)


@dataclass(frozen=True)
class TileLayout:
    """Where every bit of a tile lies.

    Args:
        lattice: one of `"e8"`, `"d4"`, `"a2"`, `"z"`.
        tile: coefficients per tile, a multiple of 128 up to 1536.
        code: entropy code, a key of `RATE_TABLE[lattice]`: eight times the rate it was made for. Gives Rice parameter and quotient code.
        words: 32-bit words per tile, everything included.

    Raises:
        ValueError: an argument is out of range, or the words cannot hold a tile of zeros.
    """

    lattice: str
    tile: int
    code: int
    words: int

    def __post_init__(self) -> None:
        if self.lattice not in LATTICES:
            raise ValueError(f"lattice must be one of {', '.join(LATTICES)}, got {self.lattice!r}")
        if self.tile % GROUP or not GROUP <= self.tile <= MAX_TILE:
            raise ValueError(f"tile must be a multiple of {GROUP} from {GROUP} to {MAX_TILE}, got {self.tile}")
        codes = RATE_TABLE[self.lattice]
        if self.code not in codes:
            raise ValueError(f"code must be from {min(codes)} to {max(codes)} for lattice {self.lattice!r}, got {self.code!r}")
        # each region must hold its half of a tile of zeros wherever the wall stands
        if self.end - self.start < self.zeros_bits + 2 * 8 * self.wall_unit:
            raise ValueError(f"words={self.words} is too few for tile={self.tile} with code={self.code}")

    @property
    def _rate(self) -> Rate:
        return RATE_TABLE[self.lattice][self.code]

    @property
    def rice_parameter(self) -> int:
        """k, raw bits per symbol: the sign and k - 1 low bits of the magnitude."""
        return self._rate.rice_parameter

    @property
    def quotient_code(self) -> QuotientCode:
        return quotient_code(*self._rate.code_key)

    @property
    def classes(self) -> int:
        """Quotients are below this."""
        return len(self._rate.even)

    @property
    def max_magnitude(self) -> int:
        """Largest one's-complement magnitude of a symbol."""
        return (self.classes << (self.rice_parameter - 1)) - 1

    @property
    def largest_value(self) -> float:
        """Largest magnitude of a coordinate at scale 1 that the code can hold."""
        m = self.max_magnitude + 1
        return float(2 * m if self.lattice in ("e8", "a2") else m)

    @property
    def shift(self) -> int:
        """Bits of a code (not symbol) below the quotient."""
        return self.rice_parameter - (self.lattice != "e8")

    @property
    def kernel_shift(self) -> int:
        """Bits below the quotient in the kernels' codes, which are `codes << (kernel_shift - shift)`.

        Where quotients have two bits and the codes room for it, the quotient stands right below the sign, and the length in the five low
        bits of a table entry, from where it need not be shifted. a2's second coordinates are twice as large and leave no room.
        """
        return 5 if self.classes <= 4 and self.lattice != "a2" else self.shift

    @property
    def kernel_length_place(self) -> int:
        """Place of the length in the kernels' table entries."""
        return 0 if self.classes <= 4 and self.lattice != "a2" else self.shift + 3

    def table(self, device: torch.device) -> torch.Tensor:
        """The quotient code's decoding table on a device, `[4096]` int32, made once."""
        key = ("table", self._rate.code_key, self.shift)
        return on_device(key, lambda: self.quotient_code.table(self.shift, self.shift + 3), device)

    def kernel_tables(self, device: torch.device, plain: bool = False) -> torch.Tensor:
        """The kernels' decoding tables for both directions on a device, `[2, 4096]` int32, made once; `plain`: for codes as they are."""
        shift, place = (self.shift, self.shift + 3) if plain else (self.kernel_shift, self.kernel_length_place)
        return on_device(("tables", self._rate.code_key, shift, place), lambda: self.quotient_code.tables_both_ways(shift, place), device)

    def lengths(self, device: torch.device) -> torch.Tensor:
        """Code lengths of the quads on a device, `[classes^4]` int32."""
        return on_device(("lengths", self._rate.code_key), lambda: torch.tensor(self.quotient_code.lengths, dtype=torch.int32), device)

    def codewords(self, device: torch.device) -> torch.Tensor:
        """Codewords of the quads on a device, `[classes^4]` int32, right-aligned."""
        return on_device(("codewords", self._rate.code_key), lambda: torch.tensor(self.quotient_code.codewords, dtype=torch.int32), device)

    @property
    def zeros_bits(self) -> int:
        """Stream bits of a tile of zeros."""
        return self.tile // QUAD * self._rate.zeros_length

    @property
    def low_bits(self) -> list[tuple[int, int]]:
        """(word, bits) of each field of low bits, lowest first: pairs take two words."""
        k = self.rice_parameter
        return [(word, min(2, k - word)) for word in range(1, k, 2)]

    @property
    def groups(self) -> int:
        return self.tile // GROUP

    @property
    def raw_words_per_group(self) -> int:
        return LANES * self.rice_parameter - (self.lattice == "d4")

    @property
    def raw_words(self) -> int:
        return self.groups * self.raw_words_per_group

    @property
    def stream_words(self) -> int:
        return self.words - self.raw_words

    def raw_place(self, group: int, lane: int, word: int) -> int:
        """Index in the raw plane of word `word` (0: signs) of a lane and group. Not for D4's lane 3 and word 0."""
        k = self.rice_parameter
        if self.lattice == "d4":
            return group * self.raw_words_per_group + k * lane + word - (lane == LANES - 1)
        index, rest = k * group + word, k * self.groups % 4
        if index < k * self.groups - rest:
            return 16 * (index // 4) + 4 * lane + index % 4
        return LANES * (k * self.groups - rest) + rest * lane + index % 4

    @property
    def start(self) -> int:
        """First bit of lane 0 in the stream plane."""
        return HEADER_BITS

    @property
    def end(self) -> int:
        """One past the last bit of the stream plane."""
        return 32 * self.stream_words

    @property
    def wall_unit(self) -> int:
        """Bits per step of the wall: +-8 steps cover three standard deviations of half a tile's stream length."""
        return 2 if self.tile < 256 else 4 if self.tile < 1024 else 8

    @property
    def wall_center(self) -> int:
        return self.start + (self.end - self.start) // 2

    @property
    def bits_per_weight(self) -> float:
        return 32 * self.words / self.tile


def scale_to_code(scale: torch.Tensor) -> torch.Tensor:
    """Round positive scales to the nearest representable one; values out of range go to the ends.

    Args:
        scale: fp32, any shape.

    Returns:
        int32 codes in [0, 4095], increasing with the scale, same shape.
    """
    bits = scale.to(torch.float32).clamp(MIN_SCALE, MAX_SCALE).view(torch.int32)
    return (((bits + (1 << (_SCALE_SHIFT - 1))) >> _SCALE_SHIFT) - _SCALE_BIAS).clamp(0, SCALE_CODES - 1)


def scale_from_code(code: torch.Tensor) -> torch.Tensor:
    """Inverse of `scale_to_code`: int32 codes in [0, 4095] to fp32 scales."""
    return ((code.to(torch.int32) + _SCALE_BIAS) << _SCALE_SHIFT).view(torch.float32)
