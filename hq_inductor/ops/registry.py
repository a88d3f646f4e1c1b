"""Registration: one library handle, and the checks that real and fake kernels share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch._guards import TracingContext

from ..format.layout import TileLayout
from .replay import CallSite, VaryingCallSite, replayed

NAMESPACE = "hyperquant"
# Library.define + impl costs 5.6 us per eager call where torch.library.custom_op costs 17 (measured, 2-core CPU, torch 2.13)
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

_CUDA: dict[str, Callable] = {}
# ops that generated code calls without the dispatcher (`hq_inductor.passes.direct_calls`)
CALL_SITES: list[str] = []


def register(schema: str, fake: Callable, tags: tuple[torch.Tag, ...] = (), replay: bool = False, **by_device: Callable) -> None:
    """Define `hyperquant::<schema>` with a fake kernel and one implementation per dispatch key (`CPU=`, `CUDA=`).

    `replay`: on CUDA it gives one new tensor, contiguous, or none, and may launch what it launched before (`hq_inductor.ops.replay`).
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=tags)
    if "CUDA" in by_device:
        _CUDA[name] = by_device["CUDA"]
        if replay and schema.endswith("-> Tensor") and "." not in name:
            CALL_SITES.append(name)
    for key, function in by_device.items():
        if key == "CUDA":
            function = _on_own_device(replayed(function) if replay else function)
        LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def cuda_function(op: torch._ops.OpOverload) -> Callable:
    """What an op of the namespace runs on CUDA, which is another function than on a CPU where kernels are launched."""
    return _CUDA[op._opname]


def call_site(name: str, scratch: int, arguments: list) -> CallSite:
    """For generated code: calls of an op on CUDA, arguments as of `CallSite`."""
    return CallSite(_CUDA[name], scratch, arguments)


def varying_call_site(name: str, varying: list[int], arguments: list) -> VaryingCallSite:
    """As `call_site`, arguments as of `VaryingCallSite`."""
    return VaryingCallSite(_CUDA[name], varying, arguments)


def _on_own_device(function: Callable) -> Callable:
    """Launch kernels on the device of the first argument, whichever is current: Triton asks for the current one."""

    @functools.wraps(function)
    def call(first: torch.Tensor, *args, **kwargs):
        # the context costs some microseconds, also where it changes nothing
        if first.device.index == torch._C._cuda_getDevice():
            return function(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return function(first, *args, **kwargs)

    return call


_on_first_trace: Callable[[], None] | None = None


def on_first_trace(function: Callable[[], None] | None) -> None:
    """What to call once, when a compiler first traces a layer or a cache; None: nothing. For what only those need who compile."""
    global _on_first_trace
    _on_first_trace = function


def traced() -> None:
    """For fake kernels to call."""
    global _on_first_trace
    if _on_first_trace is not None and TracingContext.try_get() is not None:
        function, _on_first_trace = _on_first_trace, None
        function()


tile_layout = functools.lru_cache(maxsize=1024)(TileLayout)


def check_qdata(qdata: torch.Tensor, lattice: str, tile: int, code: int) -> TileLayout:
    """The layout of packed words, or `TypeError` / `ValueError`."""
    if qdata.dtype != torch.int32:
        raise TypeError(f"qdata must be int32, got {qdata.dtype}")
    if qdata.dim() != 3:
        raise ValueError(f"qdata must be [N, K / tile, words], got shape {tuple(qdata.shape)}")
    return tile_layout(lattice, tile, code, int(qdata.shape[-1]))


def check_codes(codes: torch.Tensor, scale: torch.Tensor, lattice: str) -> int:
    """Tile length of codes `[N, K]` int8 with scales `[N, K / tile]` fp32, or `TypeError` / `ValueError`."""
    if codes.dtype != torch.int8:
        raise TypeError(f"codes must be int8, got {codes.dtype}")
    if scale.dtype != torch.float32:
        raise TypeError(f"scale must be float32, got {scale.dtype}")
    if codes.dim() != 2 or scale.dim() != 2 or codes.shape[0] != scale.shape[0]:
        raise ValueError(f"codes must be [N, K] and scale [N, K / tile], got shapes {tuple(codes.shape)} and {tuple(scale.shape)}")
    tiles = scale.shape[1]
    if tiles == 0 or codes.shape[1] % tiles:
        raise ValueError(f"columns of codes must be a multiple of those of scale, got {codes.shape[1]} and {tiles}")
    return codes.shape[1] // tiles


def check_floating(name: str, x: torch.Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
