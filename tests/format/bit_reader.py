"""An independent reader and writer of tiles, one bit and one symbol at a time, straight from the text of `layout.py` and `rice.py`.

Slow on purpose: no code is shared with the package beyond the layout's numbers.
"""

from __future__ import annotations


def rice_code(symbol: int, k: int) -> tuple[int, int]:
    """(quotient, raw bits) of Golomb-Rice on the zigzag value."""
    zigzag = 2 * symbol if symbol >= 0 else -2 * symbol - 1
    return zigzag >> k, zigzag & ((1 << k) - 1)


def read_tile(words: list[int], lattice: str, tile: int, k: int, wall_unit: int) -> tuple[list[int], float]:
    """Codes and scale of one well-formed tile given as unsigned 32-bit integers."""
    groups = tile // 128
    per_group = 0 if k == 0 else 4 * k - (lattice == "d4")
    implied = 1 if k >= 2 else 0
    stream = "".join(f"{word:032b}" for word in words[groups * per_group :])
    code = int(stream[:12], 2)
    scale = 2.0 ** ((code >> 6) - 40) * (1 + (code & 63) / 64)
    start = 16 + (tile // 8 if lattice == "e8" and k == 0 else 0)
    wall = start + (len(stream) - start) // 2 + wall_unit * (int(stream[12:16], 2) - 8)
    lanes = [iter(stream[start:]), reversed(stream[:wall]), iter(stream[wall:]), reversed(stream)]

    def unary(lane: int) -> int:
        count = 0
        while next(lanes[lane]) == "0":
            count += 1
        return count

    def raw_bit(group: int, vector: int, lane: int, half: int, byte: int, plane: int) -> int:
        first = group * per_group
        bit = 2 * vector + half
        if lattice != "d4":
            return words[first + k * lane + plane] >> (8 * byte + bit) & 1
        if lane == 3 and plane == implied:  # its bytes 0, 1, 2 are byte 3 of lanes 0, 1, 2
            return words[first + k * byte + implied] >> (24 + bit) & 1
        index = k * lane + plane - (lane == 3 and plane > implied)
        return words[first + index] >> (8 * byte + bit) & 1

    codes: list[int] = []
    for number in range(tile // 8):
        group, vector, lane = number // 16, number // 4 % 4, number % 4
        symbols: list[int] = []
        coset = None
        span = {"e8": 8, "d4": 4}.get(lattice)
        if lattice == "e8" and k == 0:
            coset = int(stream[16 + number])
        for index in range(8):
            last = span is not None and index % span == span - 1
            quotient = unary(lane)
            parity = sum(symbols[index - index % span :]) % 2 if span else 0
            if k == 0:
                symbol = quotient // 2 if quotient % 2 == 0 else -(quotient + 1) // 2
                symbols.append(2 * symbol + parity if last else symbol)
                continue
            planes = [raw_bit(group, vector, lane, index // 4, index % 4, plane) for plane in range(k)]
            candidates = [planes]
            if last:
                if lattice == "e8":
                    coset = planes[implied]
                candidates = [planes[:implied] + [bit] + planes[implied + 1 :] for bit in (0, 1)]
            for bits in candidates:
                magnitude = (quotient << (k - 1)) + sum(bit << b for b, bit in enumerate(bits[1:]))
                symbol = -magnitude - 1 if bits[0] else magnitude
                if not last or (symbol + parity) % 2 == 0:
                    symbols.append(symbol)
                    break
        if lattice == "e8":
            codes += [2 * s + coset for s in symbols]
        elif lattice == "a2":
            for n_y, t_x in zip(symbols[::2], symbols[1::2], strict=True):
                codes += [n_y, 2 * t_x + n_y % 2]
        else:
            codes += symbols
    return codes, scale
