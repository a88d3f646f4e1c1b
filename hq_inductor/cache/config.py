"""How a KV cache stores keys and values: rates, rotation, exact tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ..format.dither import check_dither
from ..format.quantizer import check_effort
from ..format.rates import check_rate
from ..format.rotation import check_rotation


@dataclass(frozen=True)
class KVConfig:
    """How keys and values are stored.

    Args:
        k_bps, v_bps: bits per value, everything in the slots included; a multiple of 1/8 from 1.75 (e8) or 2 to 6.
        lattice: one of `"e8"`, `"d4"`, `"a2"`, `"z"`.
        rotation: `"haar"`, `"hadamard"` or `"none"` (`hq_inductor.format.rotation`).
        window: newest tokens that are also kept exact.
        sinks: first tokens that are also kept exact.
        effort: encoder's effort, 0 to 2 (`hq_inductor.format.quantizer`).
        dither: None, `"half"` or `"full"` (`hq_inductor.format.dither`): unbiased, coarser and slower.
        center: subtract from all keys the mean of those of the first `store`, if it brings at least 16.
        seed: of rotations and dither.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    k_bps: float = 4.0
    v_bps: float = 4.0
    lattice: str = "e8"
    rotation: str = "haar"
    window: int = 64
    sinks: int = 4
    effort: int = 1
    dither: str | None = None
    center: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_rate(self.k_bps, self.lattice)
        check_rate(self.v_bps, self.lattice)
        check_rotation(self.rotation)
        check_effort(self.effort)
        check_dither(self.dither)
        for name in ("window", "sinks"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {number!r}")
