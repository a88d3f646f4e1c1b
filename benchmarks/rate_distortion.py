"""SNR against bits per weight on a Gaussian source, everything stored counted: our lattices, peers, and Shannon's bound.

    python benchmarks/rate_distortion.py

Prints a table and writes `rate_distortion.json` and `rate_distortion.png` to `--output`. The gap in bits is what the quantizer pays over
Shannon's bound for the same SNR.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peers import PEERS, shannon_snr_db, snr_db
from tqdm import tqdm
from trellis import trellis_quantize

from hq_inductor import HyperQuantTensor
from hq_inductor.format.layout import LATTICES
from hq_inductor.format.rates import MAX_BPS, MIN_BPS

# the search over states is slow; the SNR of as many has a standard error of 0.05 dB
TRELLIS_ROWS = 4


@dataclass(frozen=True)
class Point:
    """One quantizer at one rate."""

    method: str
    bits_per_weight: float
    snr_db: float

    @property
    def gap_bits(self) -> float:
        return self.bits_per_weight - self.snr_db / shannon_snr_db(1)


def ours(weight: torch.Tensor, lattice: str, effort: int, bps: float) -> Point:
    """What a decoder gets back from the packed words."""
    packed = HyperQuantTensor.from_hp(weight, bps=bps, lattice=lattice, effort=effort)
    return Point(f"{lattice} effort {effort}", packed.bits_per_weight, snr_db(weight, packed.dequantize()))


def measure(rows: int, columns: int, step: float, lattices: list[str], efforts: list[int], trellis_states: int) -> list[Point]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    jobs = []
    for lattice in lattices:
        multiples = [step * i for i in range(1, int(MAX_BPS / step) + 1)]
        # efforts differ alike in all lattices; the default suffices but for the best lattice
        for effort in efforts if lattice == "e8" else [1]:
            jobs += [(lattice, effort, bps) for bps in sorted({MIN_BPS[lattice], *(b for b in multiples if b > MIN_BPS[lattice])})]
    points = [ours(weight, *job) for job in tqdm(jobs, desc="ours")]
    for peer in tqdm(PEERS, desc="peers"):
        points.append(Point(peer.name, peer.bits_per_weight(columns), snr_db(weight, peer.quantize(weight))))
    few = weight[:TRELLIS_ROWS]
    for bits in (2, 3, 4):
        found, rate = trellis_quantize(few, bits, trellis_states, progress=True)
        points.append(Point(f"trellis, 2^{trellis_states} states", rate, snr_db(few, found)))
    return points


def print_table(points: list[Point]) -> None:
    print("| quantizer | bits per weight, all in | SNR, dB | Shannon's bound, dB | gap, bits |")
    print("|---|---|---|---|---|")
    for p in points:
        print(f"| {p.method} | {p.bits_per_weight:.3f} | {p.snr_db:.2f} | {shannon_snr_db(p.bits_per_weight):.2f} | {p.gap_bits:.3f} |")


def plot(points: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5))
    bits = [1.75, MAX_BPS]
    left.plot(bits, [shannon_snr_db(b) for b in bits], "k--", label="Shannon")
    for method in dict.fromkeys(p.method for p in points):
        own = sorted((p for p in points if p.method == method), key=lambda p: p.bits_per_weight)
        marker = "-" if len(own) > 3 else "o"
        for axes, values in ((left, [p.snr_db for p in own]), (right, [p.gap_bits for p in own])):
            axes.plot([p.bits_per_weight for p in own], values, marker, label=method, markersize=4)
    left.set(xlabel="bits per weight, all in", ylabel="SNR on N(0, 1), dB")
    right.set(xlabel="bits per weight, all in", ylabel="gap to Shannon's bound, bits")
    left.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=4096, help="multiple of 128 (default 4096)")
    parser.add_argument("--step", type=float, default=0.25, help="distance of our rates, a multiple of 1/8 (default 0.25)")
    parser.add_argument("--lattices", nargs="+", default=list(LATTICES), choices=LATTICES)
    parser.add_argument("--efforts", type=int, nargs="+", default=[0, 1, 2], help="encoder's efforts for e8 (default 0 1 2)")
    parser.add_argument("--trellis-states", type=int, default=16, help="bits of a state of the trellis (default 16)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the plot and the JSON")
    args = parser.parse_args()
    points = measure(args.rows, args.columns, args.step, args.lattices, args.efforts, args.trellis_states)
    args.output.mkdir(parents=True, exist_ok=True)
    data = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "rows": args.rows,
        "columns": args.columns,
        "points": [{**asdict(p), "gap_bits": p.gap_bits} for p in points],
    }
    (args.output / "rate_distortion.json").write_text(json.dumps(data, indent=1))
    plot(points, args.output / "rate_distortion.png")
    print_table(points)


if __name__ == "__main__":
    main()
