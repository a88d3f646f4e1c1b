"""Launches of the fused linear kernel that were measured on a GPU and beat the rules of `hq_inductor.ops.launch`.

Files.       `launches/<device>.json` of this package, the device as of `table_name`; `use_launches` names one to take instead.
             `benchmarks/linear.py --tune --save` writes them.
Format.      What was measured where, and entries, one per line: a `Shape`, a launch of kind "linear" or "ring", and its gain, the time that
             the rules' launch takes in units of its own, at the batch of its class where it is least.
Invariants.  A file is taken as a whole or not at all: one that is damaged, or has a launch that the kernel would not take, gives a warning.
             Nothing is measured at run time, and files are read once per device.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .kernels.linear import most_strips
from .kernels.warpgroup import ring_shape
from .launch import REGISTERS, RING_COLUMNS, WARP_ROWS, LinearLaunch, RingLaunch, decode_warps, ring_products, ring_warps
from .replay import forget_plans

FORMAT = 1
DIRECTORY = Path(__file__).parent / "launches"
KINDS = {"linear": LinearLaunch, "ring": RingLaunch}
# fields that are true or false
FLAGS = ("cluster",)
# about a file, as text
ABOUT = ("device", "torch", "triton", "date", "command")
# bounds of a launch's `registers`, unless it is 0: far below what any of the kernels takes, and the most that a thread has
LEAST_REGISTERS, MOST_REGISTERS = 32, 255


class Shape(NamedTuple):
    """What an entry is for: a batch class (`batch_class`), and rows, tiles per row and `row_bytes` as `linear_launch` takes them."""

    batch: int
    rows: int
    tiles: int
    row_bytes: int


def batch_class(batch: int, ring: bool) -> int | None:
    """Largest batch that is launched as this one is, or None for one that takes several blocks of columns; `ring`: may be one."""
    return next((columns for columns in (*REGISTERS, *(RING_COLUMNS if ring else ())) if batch <= columns), None)


def table_name(device_name: str) -> str:
    """File of a device, by what `torch.cuda` calls it: "NVIDIA H200" -> "nvidia_h200.json"."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


_given: Path | None = None


def use_launches(path: str | Path | None) -> None:
    """Take launches from a file, on every GPU of the process, from here on; None: from this package again.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a table, or has a launch that no kernel would take. What was in use stays in use.
    """
    global _given
    if path is not None:
        read_table(path, True)
    _given = None if path is None else Path(path).resolve()
    _launches.cache_clear()
    stored_launch.cache_clear()
    forget_plans()


@functools.lru_cache(maxsize=4096)
def stored_launch(batch: int, rows: int, tiles: int, row_bytes: int, device: torch.device) -> LinearLaunch | RingLaunch | None:
    """Launch that is stored for a CUDA device and arguments of `linear_launch`, or None."""
    launches = _launches(device)
    return launches.get((batch_class(batch, ring_products(device)), rows, tiles, row_bytes)) if launches else None


@functools.lru_cache(maxsize=32)
def _launches(device: torch.device) -> Mapping[Shape, LinearLaunch | RingLaunch]:
    """What is stored for a device. Warns, and gives nothing, where a file is of no use."""
    path = _given or DIRECTORY / table_name(torch.cuda.get_device_properties(device).name)
    if not _given and not path.exists():
        return {}
    try:
        return read_table(path, ring_products(device))
    except (OSError, ValueError) as error:
        warnings.warn(f"launches of linear layers are chosen by rule, {path} is left out: {error}", RuntimeWarning, stacklevel=2)
        return {}


def read_table(path: str | Path, ring: bool) -> dict[Shape, LinearLaunch | RingLaunch]:
    """The entries of a file, for a device that has the kernel with a ring or not.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not of this format, or has an entry twice, or a launch that the kernel would not take.
    """
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(f"it must be a JSON object of format {FORMAT}")
    _check_fields("the file", table, ("format", *ABOUT, "entries"))
    if not isinstance(table["entries"], list):
        raise ValueError("entries must be a list")
    launches = {}
    for entry in table["entries"]:
        try:
            shape, launch = _read_entry(entry, ring)
            if shape in launches:
                raise ValueError("it is there twice")
        except ValueError as error:
            raise ValueError(f"entry {json.dumps(entry)}: {error}") from error
        launches[shape] = launch
    return launches


def _read_entry(entry: object, ring: bool) -> tuple[Shape, LinearLaunch | RingLaunch]:
    if not isinstance(entry, dict):
        raise ValueError("it must be an object")
    kind = next((name for name in KINDS if name in entry), "linear")
    _check_fields("it", entry, (*Shape._fields, kind, "gain"))
    if type(entry["gain"]) not in (int, float):
        raise ValueError(f"gain must be a number, got {entry['gain']!r}")
    shape = Shape(**_integers({name: entry[name] for name in Shape._fields}))
    if shape.batch != batch_class(shape.batch, True) or min(shape.rows, shape.tiles) < 1 or shape.row_bytes not in (0, 64, 128):
        raise ValueError(f"there is no such {shape}")
    fields = entry[kind]
    if not isinstance(fields, dict):
        raise ValueError(f"{kind} must be an object")
    _check_fields(kind, fields, _stored(KINDS[kind]))
    flags = {name: value for name, value in fields.items() if name in FLAGS}
    for name, value in flags.items():
        if type(value) is not bool:
            raise ValueError(f"{name} must be true or false, got {value!r}")
    launch = KINDS[kind](**_integers({name: value for name, value in fields.items() if name not in FLAGS}), **flags)
    check_launch(shape, launch, ring)
    return shape, launch


def _stored(kind: type[LinearLaunch | RingLaunch]) -> list[str]:
    """Fields of a launch in a file, which has launches of int8 products only."""
    return [field.name for field in dataclasses.fields(kind) if field.name != "fp8"]


def _check_fields(what: str, found: Mapping, expected) -> None:
    if set(found) != set(expected):
        raise ValueError(f"{what} must have the fields {', '.join(expected)}, got {', '.join(found)}")


def _integers(fields: Mapping[str, object]) -> dict[str, int]:
    for name, value in fields.items():
        if type(value) is not int:
            raise ValueError(f"{name} must be an integer, got {value!r}")
    return dict(fields)


def check_launch(shape: Shape, launch: LinearLaunch | RingLaunch, ring: bool) -> None:
    """Whether the kernel takes a launch for a shape.

    Raises:
        ValueError: too many warps or columns for shared memory, too few blocks or too many, registers that a thread cannot have, more
            splits than tiles, or a ring where there is none.
    """
    warps = decode_warps(shape.row_bytes)
    if launch.num_warps > warps:
        raise ValueError(f"num_warps must be at most {warps} for row_bytes {shape.row_bytes}, got {launch.num_warps}")
    if launch.registers and not LEAST_REGISTERS <= launch.registers <= MOST_REGISTERS:
        raise ValueError(f"registers must be 0 or from {LEAST_REGISTERS} to {MOST_REGISTERS}, got {launch.registers}")
    if isinstance(launch, RingLaunch):
        if not ring:
            raise ValueError("the device has no kernel with a ring")
        parts = launch.splits * launch.sharing
        if parts > shape.tiles:
            raise ValueError(f"splits times sharing must be at most the {shape.tiles} tiles, got {parts}")
        # tiles are staged only where there is room; without them is what must fit
        blocks = max(1, ring_warps(launch.registers) // launch.num_warps)
        ring_shape(launch.columns, launch.num_warps, blocks, 0, shape.row_bytes, False, launch.fp8, launch.sharing)
        return
    most, strips = most_strips(launch.columns, launch.num_warps, shape.row_bytes), -(-shape.rows // WARP_ROWS)
    if not strips <= launch.blocks * most <= strips * most:
        raise ValueError(f"blocks must be from {-(-strips // most)} to {strips} for {shape.rows} rows, got {launch.blocks}")


def write_table(path: str | Path, about: Mapping[str, str], entries: Mapping[Shape, tuple[LinearLaunch | RingLaunch, float]]) -> None:
    """Write a file.

    Args:
        about: where and how it was measured, the keys `ABOUT`.
        entries: for each shape the launch and its gain.
    """
    _check_fields("about", about, ABOUT)
    lines = []
    for shape, (launch, gain) in sorted(entries.items(), key=lambda entry: entry[0]):
        kind = "ring" if isinstance(launch, RingLaunch) else "linear"
        lines.append(
            "\n    "
            + json.dumps({**shape._asdict(), kind: {name: getattr(launch, name) for name in _stored(type(launch))}, "gain": round(gain, 3)})
        )
    head = "".join(f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in {"format": FORMAT, **about}.items())
    text = f'{{\n{head}  "entries": [{",".join(lines)}\n  ]\n}}\n'
    Path(path).write_text(text, encoding="utf-8")
