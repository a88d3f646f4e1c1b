"""Which rewrites are made: frozen data, replaced as a whole.

A compiled graph keeps what it was compiled with. The configuration is part of Inductor's cache key, so a changed one compiles anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True)
class PassConfig:
    """One switch per rewrite: True, False, or `"auto"`, which is where it pays (`hq_inductor.passes.policy`).

    Args:
        merge_siblings: layers that read the same activations become one op: one rotation, one launch.
        fuse_norm: an RMSNorm or LayerNorm that only feeds quantized layers moves into their first kernel.
        fuse_gate: `silu(gate) * up`, or gelu, that only feeds quantized layers moves into their first kernel.
        fuse_residual: an addition to a layer's output moves into its last kernel.
        direct_calls: no rewrite: on CUDA, generated code calls layers and attention without the dispatcher, in memory that Inductor lends.
        compile_ahead: no rewrite: on CUDA, the layers' kernels compile in Inductor's worker processes while it compiles the graph.

    Raises:
        ValueError: a switch is none of the three.
    """

    merge_siblings: bool | str = AUTO
    fuse_norm: bool | str = AUTO
    fuse_gate: bool | str = AUTO
    fuse_residual: bool | str = AUTO
    direct_calls: bool | str = AUTO
    compile_ahead: bool | str = AUTO

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not (isinstance(value, bool) or value == AUTO):
                raise ValueError(f"{name} must be True, False or {AUTO!r}, got {value!r}")


_current = PassConfig()


def current_config() -> PassConfig:
    """The configuration that the next compilation takes."""
    return _current


def configure(**switches: bool | str) -> PassConfig:
    """Change switches for the compilations from here on.

    Args:
        switches: fields of `PassConfig`; those not given stay as they are.

    Returns:
        The configuration before: `configure(**dataclasses.asdict(before))` brings it back.

    Raises:
        TypeError: there is no such switch. ValueError: a value is not allowed.
    """
    global _current
    unknown = set(switches) - {field.name for field in dataclasses.fields(PassConfig)}
    if unknown:
        known = ", ".join(field.name for field in dataclasses.fields(PassConfig))
        raise TypeError(f"switches must be among {known}, got {', '.join(sorted(unknown))}")
    before, _current = _current, dataclasses.replace(_current, **switches)
    return before


@contextlib.contextmanager
def configured(**switches: bool | str) -> Iterator[PassConfig]:
    """`configure` for a `with` block. What counts is when a graph is compiled, which is at its first call."""
    before = configure(**switches)
    try:
        yield _current
    finally:
        configure(**dataclasses.asdict(before))
