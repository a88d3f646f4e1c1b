import math
import random

import pytest
import torch

from hq_inductor.format.quotient_code import MAX_CLASSES, TABLE_BITS, QuotientCode, huffman_lengths, quad_weights
from hq_inductor.format.rate_table import RATE_TABLE

from .bit_reader import canonical_code


@pytest.mark.parametrize("size", [2, 3, 17, 256])
def test_huffman_is_optimal(size):
    """Complete, within one bit of the entropy, and no exchange of two lengths lowers the mean: the marks of an optimal prefix code."""
    weights = [random.Random(size).randrange(1, 10**6) for _ in range(size)]
    lengths = huffman_lengths(weights)
    assert sum(2.0**-length for length in lengths) == 1
    total = sum(weights)
    entropy = -sum(w / total * math.log2(w / total) for w in weights)
    assert entropy <= sum(w * n for w, n in zip(weights, lengths, strict=True)) / total < entropy + 1
    by_weight = [n for _, n in sorted(zip(weights, lengths, strict=True), key=lambda pair: (pair[0], -pair[1]))]
    assert by_weight == sorted(by_weight, reverse=True)


@pytest.mark.parametrize("lattice", RATE_TABLE)
@pytest.mark.parametrize("eighths", [16, 20, 24, 28, 32, 33, 40, 48])
def test_table_reads_every_code(lattice, eighths):
    rate = RATE_TABLE[lattice][eighths]
    shift = rate.rice_parameter - (lattice != "e8")
    code = QuotientCode(*rate.code_key)
    lengths = list(code.lengths)
    assert max(lengths) <= TABLE_BITS and sum(2.0**-length for length in lengths) == 1
    symbols = canonical_code(lengths)
    assert all(symbols[length, word] == s for s, (length, word) in enumerate(zip(lengths, code.codewords, strict=True)))
    table = code.table(shift, shift + 3).tolist()
    assert len(table) == 1 << TABLE_BITS
    for index, entry in enumerate(table):
        length = entry >> (shift + 3) & 31  # five bits, as a shift amount sees them
        symbol = symbols[length, index >> (TABLE_BITS - length)]
        for position in range(4):
            assert (entry >> (8 * position + shift)) & 7 == symbol // code.classes**position % code.classes
        # nothing but quotients and length
        assert entry & ~((0x07070707 << shift) | (15 << (shift + 3))) == 0 and entry >= 0


@pytest.mark.parametrize("place", [0, 8])
def test_tables_both_ways(place):
    code = QuotientCode(*RATE_TABLE["e8"][32].code_key)
    forwards, backwards = code.tables_both_ways(5, place).tolist()
    assert forwards == code.table(5, place).tolist()
    for index, entry in enumerate(forwards):
        other = backwards[int(f"{index:012b}"[::-1], 2)]
        assert (entry >> place & 31) + (other >> place & 31) == 32
        assert entry & ~(31 << place) == other & ~(31 << place)


def test_weights_are_products_in_order():
    even, odd = (5, 3, 2), (7, 4, 1)
    weights = quad_weights(even, odd, 10)
    for symbol, weight in enumerate(weights):
        q = [symbol // 3**position % 3 for position in range(4)]
        assert weight == max(10, even[q[0]] * odd[q[1]] * even[q[2]] * odd[q[3]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1,), (1,), 0), "even and odd must be weights of the same 2 to 6"),
        (((1, 2), (1, 2, 3), 0), "even and odd must be"),
        (((1,) * (MAX_CLASSES + 1), (1,) * (MAX_CLASSES + 1), 0), "even and odd must be"),
        (((1 << 12, 1, 1, 1), (1 << 12, 1, 1, 1), 0), "floor=0 is too low"),
    ],
)
def test_quotient_code_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuotientCode(*arguments)


def test_table_is_int32():
    code = QuotientCode((2, 1), (2, 1), 1)
    assert code.table(0, 3).dtype == torch.int32
