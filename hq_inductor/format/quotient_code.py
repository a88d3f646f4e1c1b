"""The Huffman code of Rice quotients, four at a time, and its decoding table.

Definition.  A *quad* `(q0, q1, q2, q3)` of quotients below `classes` is one symbol of a canonical Huffman code with lengths of at most
             12 bits.
             Its weight is the product of the four integer class weights (two rows of weights: even and odd positions), raised to `floor`
             where it is less, which bounds the lengths. Everything is integer arithmetic: the same code on every machine.
             Canonical: shorter codes first, quads in order of `q0 + A q1 + A^2 q2 + A^3 q3` within a length.
Storage.     Table entry of the 12 stream bits that start with a code:

               bit   31 .. 24   23 .. 16   15 .. 8    7 .. 0
                     q3         q2         q1         q0            each `<< shift` within its byte
               and the length in five bits from `length_place` on, where the quotients leave them free

             so `entry >> length_place` is a shift amount modulo 32, and `entry & mask` four coefficients' high bits.
Cost.        One table look-up per four weights. Against unary (Rice) codes of the same symbols 0.05 to 0.3 bits less, by rate: an
             alphabet of 1296 quads has no rounding loss to speak of.
Source.      Huffman, 1952; HyperQuant, arXiv 2606.23406 codes the quotients in unary.
"""

from __future__ import annotations

import functools
import heapq

import torch

TABLE_BITS = 12
QUAD = 4
MAX_CLASSES = 6


def huffman_lengths(weights: list[int]) -> list[int]:
    """Code lengths of Huffman's algorithm; ties go to the earlier symbol, then to the earlier merge."""
    n = len(weights)
    heap = [(weight, index) for index, weight in enumerate(weights)]
    heapq.heapify(heap)
    parent = [0] * (2 * n - 1)
    for node in range(n, 2 * n - 1):
        a, b = heapq.heappop(heap), heapq.heappop(heap)
        parent[a[1]] = parent[b[1]] = node
        heapq.heappush(heap, (a[0] + b[0], node))
    depth = [0] * (2 * n - 1)
    for node in range(2 * n - 3, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[:n]


def quad_weights(even: tuple[int, ...], odd: tuple[int, ...], floor: int) -> list[int]:
    """Weights of all quads, `q0` fastest."""
    return [max(a * b * c * d, floor) for d in odd for c in even for b in odd for a in even]


class QuotientCode:
    """Lengths and codewords of all quads.

    Attributes:
        classes: quotients are below this, A.
        lengths: of the `A^4` quads, at most 12.
        codewords: of the quads, right-aligned.

    Plain integers: what is made while a compiler traces with fake tensors must be real. Tensors of it come from `on_device`.
    """

    def __init__(self, even: tuple[int, ...], odd: tuple[int, ...], floor: int):
        if len(even) != len(odd) or not 2 <= len(even) <= MAX_CLASSES:
            raise ValueError(f"even and odd must be weights of the same 2 to {MAX_CLASSES} classes, got {even} and {odd}")
        lengths = huffman_lengths(quad_weights(even, odd, floor))
        if max(lengths) > TABLE_BITS:
            raise ValueError(f"floor={floor} is too low: it gives a code of {max(lengths)} bits, at most {TABLE_BITS} are allowed")
        self.classes = len(even)
        codewords, next_code, last = [0] * len(lengths), 0, 0
        self._order = sorted(range(len(lengths)), key=lambda symbol: (lengths[symbol], symbol))
        for symbol in self._order:
            next_code <<= lengths[symbol] - last
            last = lengths[symbol]
            codewords[symbol] = next_code
            next_code += 1
        self.lengths, self.codewords = tuple(lengths), tuple(codewords)

    def table(self, shift: int, length_place: int) -> torch.Tensor:
        """Decoding table `[2^12]` int32 for quotients that stand `shift` bits up in their byte and lengths at `length_place`."""
        a = self.classes
        symbol = torch.tensor(self._order)
        length = torch.tensor(self.lengths)[symbol]
        entry = length << length_place
        for position in range(QUAD):
            entry |= (symbol // a**position % a) << (8 * position + shift)
        # a canonical code fills the table in order
        return entry.to(torch.int32).repeat_interleave(1 << (TABLE_BITS - length))

    def tables_both_ways(self, shift: int, length_place: int) -> torch.Tensor:
        """Two tables, `[2, 2^12]` int32: as `table`; and by the same bits in reverse order, with `32 - length` for the length.

        A lane that reads backwards finds its next bits at the low end of a window, and rotates the other way.
        """
        forwards = self.table(shift, length_place)
        backwards = forwards ^ (((forwards >> length_place) & 31) << length_place) | (
            ((32 - ((forwards >> length_place) & 31)) & 31) << length_place
        )
        index = torch.arange(1 << TABLE_BITS)
        reverse = sum(((index >> bit) & 1) << (TABLE_BITS - 1 - bit) for bit in range(TABLE_BITS))
        return torch.stack((forwards, backwards[reverse]))


@functools.lru_cache(maxsize=256)
def quotient_code(even: tuple[int, ...], odd: tuple[int, ...], floor: int) -> QuotientCode:
    """The code of these weights, built once."""
    return QuotientCode(even, odd, floor)
