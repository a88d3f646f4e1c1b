"""Calls of an op that launch again what an equal call launched before, without Python between the kernels.

Why.         From Python the two launches of a linear layer, and what leads to them, cost the host 190 us (a virtual machine's): Triton
             binds 60 arguments for each, specializes them and makes a key of them. A GPU takes 10 us for both. With CUDA graphs nobody
             pays; without, a model waits for nothing else.
How.         The first call of its kind runs as ever and is recorded: kernels as Triton compiled them, grids, and of every argument where it
             came from: an input, memory that the call allocated, a constant. Calls of the same kind allocate as much, put their own
             addresses in, and launch. Calls are of one kind if all arguments agree, tensors in shape, strides, dtype and device.
Invariants.  Whatever is not plainly a launch or an allocation is not recorded, and runs as ever: other torch operations (a dispatch mode
             sees them all), addresses of unknown origin, two inputs at one address (which of them it was cannot be told), inputs that do
             not start at 16 bytes (Triton compiles others for them), kernels whose launches are observed.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..format.on_device import is_kept

# kinds of calls that are kept: batch sizes that change from call to call must not fill memory
MOST_PLANS = 4096
# calls of a kind that are recorded in vain
MOST_FAILURES = 3
# of allocations that are made at once
_ALIGNMENT = 256

_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.new_empty.default}
_VIEWS = {
    _aten.view.default,
    _aten.view.dtype,
    _aten._unsafe_view.default,
    _aten._reshape_alias.default,
    _aten.as_strided.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.expand.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
}


@dataclass(frozen=True)
class _Place:
    """An address: bytes after the start of the i-th input, or of the i-th allocation, which has number -1 - i."""

    source: int
    offset: int


class _Recorder(TorchDispatchMode):
    """Notes allocations and launches of the calls within it."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        # empty ones have no address
        addresses = [(tensor.data_ptr(), i) for i, tensor in enumerate(inputs) if tensor.data_ptr()]
        self.inputs = dict(addresses)
        self.allocated: list[torch.Tensor] = []
        # compiled kernel, grid, arguments: of pointers where they are
        self.launches: list[tuple[object, tuple[int, ...], list]] = []
        self.fails = len(self.inputs) < len(addresses)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocated.append(result)
        elif func not in _VIEWS:
            self.fails = True
        return result

    def launched(self, compiled: object, grid: tuple[int, ...], arguments: list) -> None:
        if not hasattr(compiled, "packed_metadata"):
            self.fails = True
            return
        self.launches.append((compiled, grid, [self._place(arg) if isinstance(arg, torch.Tensor) else arg for arg in arguments]))

    def _place(self, tensor: torch.Tensor) -> _Place | int:
        address = tensor.data_ptr()
        if address == 0:
            return 0
        if address in self.inputs:
            return _Place(self.inputs[address], 0)
        for i, owner in enumerate(self.allocated):
            offset = address - owner.data_ptr()
            if 0 <= offset < owner.untyped_storage().nbytes():
                return _Place(-1 - i, offset)
        if is_kept(tensor):
            # for good
            return address
        self.fails = True
        return 0


_recording = threading.local()


def recorder() -> _Recorder | None:
    """What the launches of this thread are to be reported to."""
    return getattr(_recording, "recorder", None)


@dataclass(frozen=True)
class _Launch:
    run: Callable
    head: tuple  # grid
    tail: tuple  # function and metadata
    arguments: itemgetter  # from all values of a plan


@dataclass
class Plan:
    """What calls of one kind do."""

    result: tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None  # shape, strides and dtype
    device: torch.device
    scratch: int  # bytes
    offsets: list[int]  # of addresses in the scratch
    launches: list[_Launch]
    constants: list

    def run(self, pointers: list[int]) -> torch.Tensor | None:
        """`pointers` of the inputs; on the current stream of the plan's device, which is the current one."""
        out = None
        if self.result is not None:
            out = _allocate(*self.result)
            pointers.append(out.data_ptr())
        if self.scratch:
            scratch = _allocate((self.scratch,), (1,), torch.uint8)
            first = scratch.data_ptr()
            for offset in self.offsets:
                pointers.append(first + offset)
        pointers += self.constants
        stream = _stream(self.device)
        for launch in self.launches:
            launch.run(*launch.head, stream, *launch.tail, *launch.arguments(pointers))
        return out


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


def _allocate(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized memory on the current CUDA device: half the time of `torch.empty`, for code that Inductor generates."""
    return torch._C._dynamo.guards._empty_strided_cuda(shape, strides, dtype)


def _observed() -> bool:
    """Whether somebody wants to know of launches (Triton's hooks), which plans do not tell."""
    runtime = _triton_runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (enter is not None and bool(getattr(enter, "calls", True))) or (leave is not None and bool(getattr(leave, "calls", True)))


@functools.cache
def _triton_runtime():
    from triton import knobs  # it is there on Linux only

    return knobs.runtime


def _plan(recorder: _Recorder, device: torch.device, inputs: int, out: torch.Tensor | None) -> Plan | None:
    """What was recorded, or None if it cannot be done again."""
    if recorder.fails or not recorder.launches:
        return None
    returned = None
    if out is not None:
        owners = [i for i, tensor in enumerate(recorder.allocated) if tensor.data_ptr() == out.data_ptr() != 0]
        if len(owners) != 1 or not out.is_contiguous():
            return None
        returned, owner = owners[0], recorder.allocated[owners[0]]
        if out.dtype != owner.dtype or out.numel() != owner.numel():
            return None
    # where allocations begin in the scratch, without the one that is returned
    begins, size = {}, 0
    for i, tensor in enumerate(recorder.allocated):
        if i != returned:
            begins[-1 - i] = size
            size += math.ceil(tensor.untyped_storage().nbytes() / _ALIGNMENT) * _ALIGNMENT
    # values of a plan: inputs, the result, addresses in the scratch; then constants
    values = [("input", i) for i in range(inputs)] + ([] if returned is None else [("result", 0)])
    launches = []
    for compiled, grid, arguments in recorder.launches:
        found = []
        for argument in arguments:
            if not isinstance(argument, _Place):
                found.append(("constant", argument))
            elif argument.source >= 0:
                found.append(("input", argument.source))
            elif argument.source in begins:
                found.append(("scratch", begins[argument.source] + argument.offset))
            elif argument.offset == 0:
                found.append(("result", 0))
            else:
                # it is one piece
                return None
        launches.append((compiled, grid, found))
    offsets = sorted({value for _, _, found in launches for kind, value in found if kind == "scratch"})
    values += [("scratch", offset) for offset in offsets]
    constants: list = []
    steps = []
    for compiled, grid, found in launches:
        indices = []
        for kind, value in found:
            if kind == "constant":
                # each its own place: 1 and 1.0 are equal, but not to a launcher
                indices.append(len(values) + len(constants))
                constants.append(value)
            else:
                indices.append(values.index((kind, value)))
        tail = (compiled.function, compiled.packed_metadata, None, None, None)
        steps.append(_Launch(compiled.run, (*grid, 1, 1)[:3], tail, itemgetter(*indices)))
    result = None if out is None else (tuple(out.shape), out.stride(), out.dtype)
    return Plan(result, device, size, offsets, steps, constants)


_plans: dict[tuple, Plan | int] = {}


def forget_plans() -> None:
    """Record anew: for what changes how calls are launched."""
    _plans.clear()


# what is part of a kind as it is; before a tensor is looked for, which takes longer
_PLAIN = {type(None), bool, int, float, str}


def _kind(args: Sequence, key: list, tensors: list[torch.Tensor], pointers: list[int]) -> None:
    """Append what calls of a kind have in common, and tensors with their addresses."""
    for arg in args:
        kind = arg.__class__
        if kind in _PLAIN:
            key.append(arg)
        elif kind is list:
            key.append(len(arg))
            _kind(arg, key, tensors, pointers)
        else:
            key += (arg.shape, arg.stride(), arg.dtype, arg.get_device())
            tensors.append(arg)
            pointers.append(arg.data_ptr())


def replayed(function: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    """`function`, an op's on CUDA that gives a tensor of its own or none, from plans where it can be.

    The device of the first argument is the current one.
    """

    def call(*args):
        key: list = [function]
        tensors: list[torch.Tensor] = []
        pointers: list[int] = []
        _kind(args, key, tensors, pointers)
        kind = tuple(key)
        plan = _plans.get(kind, 0)
        aligned = 0
        for pointer in pointers:
            aligned |= pointer & 15
        if aligned or _observed():
            return function(*args)
        if plan.__class__ is Plan:
            return plan.run(pointers)
        if plan >= MOST_FAILURES or recorder() is not None:
            return function(*args)
        noted = _Recorder(tensors)
        _recording.recorder = noted
        try:
            with noted:
                out = function(*args)
        finally:
            _recording.recorder = None
        addresses = [pointer for pointer in pointers if pointer]
        if len(set(addresses)) == len(addresses):
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            _plans[kind] = _plan(noted, args[0].device, len(tensors), out) or plan + 1
        return out

    return call
