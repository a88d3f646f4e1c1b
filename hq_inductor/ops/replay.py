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

import copy
import functools
import logging
import math
import threading
import weakref
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

log = logging.getLogger("hq_inductor.ops")

_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.new_empty.default}
_VIEWS = {
    # of fake tensors
    torch.ops.prim.device.default,
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


class Allocations(TorchDispatchMode):
    """Notes allocations of the calls within it, and whether they do more than allocate, look at memory in other ways, and launch."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[torch.Tensor] = []
        self.fails = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocated.append(result)
        elif func not in _VIEWS:
            self.fails = True
        return result

    def returned(self, out: torch.Tensor) -> int | None:
        """Which allocation is the memory of a call's result, all of it, contiguous; None if none is."""
        owners = [i for i, tensor in enumerate(self.allocated) if _memory(tensor) == _memory(out)]
        if len(owners) != 1 or not out.is_contiguous() or out.storage_offset():
            return None
        owner = self.allocated[owners[0]]
        return owners[0] if out.dtype == owner.dtype and out.numel() == owner.numel() else None

    def places(self, returned: int | None) -> tuple[dict[int, int], int]:
        """Where allocations but for the result are in one piece of memory, and bytes of that."""
        begins, size = {}, 0
        for i, tensor in enumerate(self.allocated):
            if i != returned:
                begins[i] = size
                size += math.ceil(tensor.untyped_storage().nbytes() / _ALIGNMENT) * _ALIGNMENT
        return begins, size

    def scratch(self, out: torch.Tensor) -> int | None:
        """Bytes beside the result, or None if there can be no plan."""
        returned = self.returned(out)
        return None if self.fails or returned is None else self.places(returned)[1]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recorder(Allocations):
    """Notes launches too."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        # empty ones have no address
        addresses = [(tensor.data_ptr(), i) for i, tensor in enumerate(inputs) if tensor.data_ptr()]
        self.inputs = dict(addresses)
        # compiled kernel, grid, arguments: of pointers where they are
        self.launches: list[tuple[object, tuple[int, ...], list]] = []
        self.fails = len(self.inputs) < len(addresses)

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
    function: Callable
    arguments: itemgetter  # from all values of a plan
    last: itemgetter | None  # of a last argument that is a tuple


@dataclass
class Plan:
    """What calls of one kind do. Its values: the stream, addresses of inputs and of the result, addresses in the scratch, constants."""

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
        scratch = _allocate((self.scratch,), (1,), torch.uint8) if self.scratch else None
        self.launch(pointers, 0 if scratch is None else scratch.data_ptr())
        return out

    def launch(self, pointers: list[int], scratch: int) -> None:
        """`pointers` of the inputs and the result, and the first address of the scratch."""
        values = [_stream(self.device), *pointers]
        for offset in self.offsets:
            values.append(scratch + offset)
        values += self.constants
        for launch in self.launches:
            if launch.last is None:
                launch.function(*launch.arguments(values))
            else:
                launch.function(*launch.arguments(values), launch.last(values))


class _Value:
    """Stands for a value of a plan while a launcher is asked what it makes of its arguments."""

    def __init__(self, index: int) -> None:
        self.index = index


def _asked(launcher: object, args: tuple) -> tuple[Callable, tuple]:
    """What a launch comes to, and its arguments: that of Triton's own compiled function, if its launcher does no more than to call it.

    The launcher's Python costs a third of a launch. Its arguments are another version's each time, so it is asked for them: twice, with
    something else in place of the function.
    """
    if not isinstance(getattr(launcher, "launch", None), Callable):
        return launcher, args
    asked = copy.copy(launcher)
    calls: list[tuple] = []
    asked.launch = lambda *given: calls.append(given)
    try:
        asked(*args)
        asked(*args)
    except Exception as error:
        # one that looks at what it is given; the call that is recorded is long done
        log.info("%s is called as it is: %s: %s", type(launcher).__name__, type(error).__name__, error)
        return launcher, args
    if len(calls) == 2 and repr(calls[0]) == repr(calls[1]) and not any(isinstance(arg, torch.Tensor) for arg in calls[0]):
        return launcher.launch, calls[0]
    return launcher, args


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
    returned = None if out is None else recorder.returned(out)
    if out is not None and returned is None:
        return None
    begins, size = recorder.places(returned)
    # values of a plan but for constants
    values = [("stream", 0), *(("input", i) for i in range(inputs)), *([] if returned is None else [("result", 0)])]
    launches = []
    for compiled, grid, arguments in recorder.launches:
        found = []
        for argument in arguments:
            if not isinstance(argument, _Place):
                found.append(("constant", argument))
            elif argument.source >= 0:
                found.append(("input", argument.source))
            elif -1 - argument.source in begins:
                found.append(("scratch", begins[-1 - argument.source] + argument.offset))
            elif argument.offset == 0:
                found.append(("result", 0))
            else:
                # it is one piece
                return None
        launches.append((compiled, grid, found))
    offsets = sorted({value for _, _, found in launches for kind, value in found if kind == "scratch"})
    values += [("scratch", offset) for offset in offsets]
    constants: list = []

    def place(argument: object) -> int:
        if isinstance(argument, _Value):
            return argument.index
        # each its own place: 1 and 1.0 are equal, but not to a launcher
        constants.append(argument)
        return len(values) + len(constants) - 1

    steps = []
    for compiled, grid, found in launches:
        given = [value if kind == "constant" else _Value(values.index((kind, value))) for kind, value in found]
        head = (*(*grid, 1, 1)[:3], _Value(0), compiled.function, compiled.packed_metadata, None, None, None)
        function, args = _asked(compiled.run, (*head, *given))
        last = None
        if isinstance(args[-1], tuple) and len(args[-1]) > 1:
            args, last = args[:-1], itemgetter(*map(place, args[-1]))
        steps.append(_Launch(function, itemgetter(*map(place, args)), last))
    result = None if out is None else (tuple(out.shape), out.stride(), out.dtype)
    return Plan(result, device, size, offsets, steps, constants)


_plans: dict[tuple, Plan | int] = {}


def forget_plans() -> None:
    """Record anew: for what changes how calls are launched."""
    _plans.clear()
    for site in _sites:
        site.forget()


def replayable(pointers: Sequence[int]) -> bool:
    """Whether kernels may be launched as they were before: inputs start at 16 bytes, and nobody observes launches."""
    bits = 0
    for pointer in pointers:
        bits |= pointer
    return not bits & 15 and not _observed()


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


def _recorded(
    function: Callable, args: Sequence, tensors: list[torch.Tensor], pointers: list[int], failures: int
) -> tuple[torch.Tensor | None, Plan | int]:
    """What a call gives, and a plan of it, or how many times there was none; `tensors` among its arguments, at `pointers`."""
    if failures >= MOST_FAILURES or recorder() is not None or not replayable(pointers):
        return function(*args), failures
    noted = _Recorder(tensors)
    _recording.recorder = noted
    try:
        with noted:
            out = function(*args)
    finally:
        _recording.recorder = None
    addresses = [pointer for pointer in pointers if pointer]
    if len(set(addresses)) < len(addresses):
        # another time they may be apart
        return out, failures
    return out, _plan(noted, tensors[0].device, len(tensors), out) or failures + 1


def _from_plans(
    plans: dict[tuple, Plan | int], kind: tuple, function: Callable, args: Sequence, tensors: list[torch.Tensor], pointers: list[int]
) -> torch.Tensor | None:
    """A call by the plan of its kind, which is recorded if there is none."""
    plan = plans.get(kind, 0)
    if plan.__class__ is Plan:
        return plan.run(pointers) if replayable(pointers) else function(*filled(args, tensors))
    out, outcome = _recorded(function, filled(args, tensors), tensors, pointers, plan)
    if outcome != plan:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plans[kind] = outcome
    return out


def replayed(function: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    """`function`, an op's on CUDA that gives a tensor of its own or none, from plans where it can be.

    The device of the first argument is the current one.
    """

    def call(*args):
        key: list = [function]
        tensors: list[torch.Tensor] = []
        pointers: list[int] = []
        _kind(args, key, tensors, pointers)
        return _from_plans(_plans, tuple(key), function, args, tensors, pointers)

    return call


class CallSite:
    """Calls of an op in code that Inductor generated, all of one kind: without dispatcher, keys, or memory that Inductor could lend.

    Args:
        function: the op's on CUDA, which gives one tensor of its own.
        scratch: bytes of memory that comes with each call, after the tensors, if any.
        arguments: of the op; a `Slot` for each tensor. The first tensor's device is the current one.
    """

    def __init__(self, function: Callable[..., torch.Tensor], scratch: int, arguments: Sequence) -> None:
        self.function, self.scratch, self.arguments = function, scratch, arguments
        self.forget()
        _sites.add(self)

    def forget(self) -> None:
        self.plan: Plan | int = 0

    def __call__(self, *tensors: torch.Tensor, out: torch.Tensor) -> None:
        """Write the result to `out`, contiguous, of its shape and dtype."""
        pointers = [tensor.data_ptr() for tensor in tensors]
        pointers.append(out.data_ptr())
        plan = self.plan
        if plan.__class__ is not Plan or not replayable(pointers):
            self._call(tensors, out)
            return
        scratch = pointers.pop(-2) if self.scratch else 0
        if plan.scratch > self.scratch:
            memory = _allocate((plan.scratch,), (1,), torch.uint8)
            scratch = memory.data_ptr()
        plan.launch(pointers, scratch)

    def _call(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        given = list(tensors[:-1] if self.scratch else tensors)
        arguments = filled(self.arguments, given)
        if self.plan.__class__ is Plan:
            result = self.function(*arguments)
        else:
            pointers = [tensor.data_ptr() for tensor in given]
            result, self.plan = _recorded(self.function, arguments, given, pointers, self.plan)
        out.copy_(result)


class VaryingCallSite:
    """Calls of an op in generated code whose sizes vary: without the dispatcher, and with shorter keys.

    Args:
        function, arguments: as of `CallSite`.
        varying: which tensors do.
    """

    def __init__(self, function: Callable[..., torch.Tensor], varying: Sequence[int], arguments: Sequence) -> None:
        self.function, self.varying, self.arguments = function, varying, arguments
        self.forget()
        _sites.add(self)

    def forget(self) -> None:
        self.plans: dict[tuple, Plan | int] = {}

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        kind: tuple = ()
        for i in self.varying:
            kind += (tensors[i].shape, tensors[i].stride())
        pointers = [tensor.data_ptr() for tensor in tensors]
        return _from_plans(self.plans, kind, self.function, self.arguments, list(tensors), pointers)


@dataclass(frozen=True)
class Slot:
    """The place of a call site's i-th tensor among an op's arguments."""

    index: int


def filled(argument: object, tensors: Sequence[torch.Tensor]) -> object:
    """An argument, or a list of them, with tensors in place of slots."""
    if isinstance(argument, Slot):
        return tensors[argument.index]
    return [filled(item, tensors) for item in argument] if isinstance(argument, list | tuple) else argument


_sites: weakref.WeakSet[CallSite | VaryingCallSite] = weakref.WeakSet()
