"""An independent reader of tiles, one bit and one symbol at a time, straight from the text of `layout.py`, `rice.py` and
`quotient_code.py`.

Slow on purpose: no code is shared with the package beyond the layout's numbers and the lengths of the quotient code.
"""

from __future__ import annotations


def canonical_code(lengths: list[int]) -> dict[tuple[int, int], int]:
    """(length, codeword) to symbol: within a length codewords count up in order of symbols, and go on from twice the last one + 1."""
    found, codeword, last = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths)):
        codeword <<= length - last
        found[length, codeword] = symbol
        codeword, last = codeword + 1, length
    return found


def read_tile(
    words: list[int], lattice: str, tile: int, k: int, classes: int, lengths: list[int], wall_unit: int
) -> tuple[list[int], float]:
    """Codes and scale of one well-formed tile given as unsigned 32-bit integers."""
    groups = tile // 128
    per_group = 4 * k - (lattice == "d4")
    code = canonical_code(lengths)
    stream = "".join(f"{word:032b}" for word in words[groups * per_group :])
    scale_code = int(stream[:12], 2)
    scale = 2.0 ** ((scale_code >> 6) - 40) * (1 + (scale_code & 63) / 64)
    wall = 16 + (len(stream) - 16) // 2 + wall_unit * (int(stream[12:16], 2) - 8)
    lanes = [iter(stream[16:]), reversed(stream[:wall]), iter(stream[wall:]), reversed(stream)]

    def quad(lane: int) -> list[int]:
        length = codeword = 0
        while (length, codeword) not in code:
            codeword = 2 * codeword + int(next(lanes[lane]))
            length += 1
        symbol = code[length, codeword]
        return [symbol // classes**position % classes for position in range(4)]

    def raw_word(group: int, lane: int, word: int) -> int:
        index = k * group + word
        tail = k * groups % 4
        if index < k * groups - tail:
            return words[16 * (index // 4) + 4 * lane + index % 4]
        return words[4 * (k * groups - tail) + tail * lane + index % 4]

    def raw_bit(group: int, vector: int, lane: int, half: int, byte: int, plane: int) -> int:
        """Plane 0: the sign; plane b: bit b - 1 of the magnitude."""
        word, place = plane, 4 * (vector % 2) + 2 * half + vector // 2
        if plane and (plane < k - 1 or plane % 2 == 0):  # one of a pair of low bits
            word = (plane - 1) // 2 * 2 + 1 + vector // 2
            place = 4 * (vector % 2) + 2 * half + (plane - 1) % 2
        if lattice != "d4":
            return raw_word(group, lane, word) >> (8 * byte + place) & 1
        if lane == 3 and word == 0:  # its bytes 0, 1, 2 are byte 3 of lanes 0, 1, 2
            return words[group * per_group + k * byte] >> (24 + place) & 1
        return words[group * per_group + k * lane + word - (lane == 3)] >> (8 * byte + place) & 1

    codes: list[int] = []
    span = {"e8": 8, "d4": 4}.get(lattice)
    for number in range(tile // 8):
        group, vector, lane = number // 16, number // 4 % 4, number % 4
        symbols: list[int] = []
        coset = 0
        quotients = quad(lane) + quad(lane)
        for index, quotient in enumerate(quotients):
            bits = [raw_bit(group, vector, lane, index // 4, index % 4, plane) for plane in range(k)]
            magnitude = (quotient << (k - 1)) + sum(bit << b for b, bit in enumerate(bits[1:]))
            negative = bits[0]
            if span is not None and index % span == span - 1:
                coset = bits[0] if lattice == "e8" else 0
                negative = (magnitude + sum(symbols[index - index % span :])) % 2
            symbols.append(-magnitude - 1 if negative else magnitude)
        if lattice == "e8":
            codes += [-2 * s - 1 if coset else 2 * s for s in symbols]
        elif lattice == "a2":
            for n_y, t_x in zip(symbols[::2], symbols[1::2], strict=True):
                codes += [n_y, 2 * t_x + n_y % 2]
        else:
            codes += symbols
    return codes, scale
