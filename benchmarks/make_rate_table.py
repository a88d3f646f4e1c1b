"""Compute `hq_inductor/format/rate_table.py`: Rice parameter, quotient code and starting scale of every (lattice, rate).

For each rate and each (Rice parameter, number of quotient classes) the distribution of the quotients that the default effort chooses on
N(0, 1) is found at the scale where tiles come to rest, the Huffman code is made from it, and the pair with the highest SNR is kept. Run
from the repository root: `python benchmarks/make_rate_table.py` (about two minutes).
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

import torch
from tqdm import tqdm

from hq_inductor.format import rate_table
from hq_inductor.format.lattice import codes_to_symbols, embed, nearest_point
from hq_inductor.format.layout import LATTICES, TileLayout
from hq_inductor.format.quantizer import quantize_tiles
from hq_inductor.format.quotient_code import TABLE_BITS, huffman_lengths, quad_weights
from hq_inductor.format.rice import magnitudes
from hq_inductor.format.rounding import forget_tables

TILE = 512
SAMPLES = 2**16
WEIGHT_ONE = 1 << 12
OUTPUT = Path(rate_table.__file__)


def class_weights(symbols: torch.Tensor, k: int, classes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Integer weights of the quotient classes at even and odd positions."""
    q = (magnitudes(symbols) >> (k - 1)).clamp(max=classes - 1).flatten(0, -2)
    rows = []
    for parity in (0, 1):
        count = torch.bincount(q[:, parity::2].flatten(), minlength=classes).double()
        rows.append(tuple(max(1, round(c)) for c in (count / count.sum() * WEIGHT_ONE).tolist()))
    return rows[0], rows[1]


def smallest_floor(even: tuple[int, ...], odd: tuple[int, ...]) -> int | None:
    """Least power-of-1.25 floor that keeps codes within the table, or None."""
    total = sum(even) ** 2 * sum(odd) ** 2
    low, high = 0, 60
    floors = [0] + [round(total / 2**TABLE_BITS * 1.25 ** (i - 50)) for i in range(high)]
    if max(huffman_lengths(quad_weights(even, odd, floors[-1]))) > TABLE_BITS:
        return None
    while low < high:
        middle = (low + high) // 2
        if max(huffman_lengths(quad_weights(even, odd, floors[middle]))) <= TABLE_BITS:
            high = middle
        else:
            low = middle + 1
    return floors[low]


def design(lattice: str, eighths: int, k: int, classes: int, x: torch.Tensor) -> tuple[float, rate_table.Rate] | None:
    """(SNR in dB, table row), or None where the code does not fit."""
    rms = 0.42 * 2 ** (eighths / 8) * (0.5 if lattice in ("d4", "z") else 0.8 if lattice == "a2" else 1.0)
    # from the statistics of nearest points to those of what the quantizer chooses for the code that is made from them
    codes = nearest_point(x.reshape(-1, 8) * rms, lattice).to(torch.int32)
    for _ in range(4):
        symbols, _ = codes_to_symbols(codes.reshape(-1, 8).to(torch.int32), lattice)
        if (magnitudes(symbols) >= classes << (k - 1)).float().mean() > 2e-2:
            return None
        even, odd = class_weights(symbols, k, classes)
        floor = smallest_floor(even, odd)
        if floor is None:
            return None
        zeros = huffman_lengths(quad_weights(even, odd, floor))[0]
        row = rate_table.Rate(k, even, odd, floor, zeros, rms, 0.0)
        rate_table.RATE_TABLE[lattice][eighths] = row
        forget_tables()
        try:
            layout = TileLayout(lattice, TILE, eighths, TILE * eighths // 256)
        except ValueError:
            return None
        codes, scale = quantize_tiles(x, layout, rms)
        rms = (x.square().mean(-1).sqrt() / scale).mean().item()
    error = x - embed(codes, lattice) * scale[:, None]
    snr = -10 * math.log10((error.square().mean() / x.square().mean()).item())
    return snr, row._replace(start_rms=round(rms, 3), snr_db=round(snr, 2))


def source() -> str:
    """The text of the generated file."""
    text = deque(OUTPUT.read_text().partition("RATE_TABLE: ")[:1])
    text.append("RATE_TABLE: dict[str, dict[int, Rate]] = {\n")
    for lattice, rates in rate_table.RATE_TABLE.items():
        text.append(f'    "{lattice}": {{\n')
        for eighths, row in sorted(rates.items()):
            weights = f"{row.even}, {row.odd}" if row.even != row.odd else f"*(2 * ({row.even},))"
            numbers = f"{row.floor}, {row.zeros_length}, {row.start_rms}, {row.snr_db}"
            text.append(f"        {eighths}: Rate({row.rice_parameter}, {weights}, {numbers}),\n")
        text.append("    },\n")
    return "".join(text) + "}\n"


def main() -> None:
    x = torch.randn(SAMPLES // TILE, TILE, generator=torch.Generator().manual_seed(0))
    for lattice in tqdm(LATTICES, desc="lattices"):
        rates = rate_table.RATE_TABLE[lattice]
        rates.clear()
        for eighths in tqdm(range(14 if lattice == "e8" else 16, 49), desc=lattice, leave=False):
            # of k and k + 1 with 2 to 6 classes, those that ever won when all were tried, and (k, 6)
            k = max(1, eighths // 8 - 1)
            trials = [design(lattice, eighths, *pair, x[:64]) for pair in ((k, 3), (k, 4), (k, 5), (k, 6), (k + 1, 3), (k + 1, 4))]
            best = max((t for t in trials if t is not None), key=lambda t: t[0])[1]
            rates[eighths] = design(lattice, eighths, best.rice_parameter, len(best.even), x)[1]
    OUTPUT.write_text(source())


if __name__ == "__main__":
    main()
