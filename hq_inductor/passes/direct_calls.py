"""How Inductor calls the ops on CUDA: straight from the code that it generates, into memory that it plans.

Why.     An op called through the dispatcher costs the host about 20 us beside its launches (H100, torch 2.11): dispatcher, the key of its
         plan, memory for results and for what its kernels hand to each other. Of all that generated code needs nothing: what kind of call
         it is was known when it was generated, and Inductor lends memory that other kernels are done with.
Before.  `buf0 = torch.ops.hyperquant.rice_linear.no_grad(x, qdata, None, None, "e8", ...)`
After.   `buf0 = empty_strided_cuda((4352,), (1,), torch.uint8)`, `buf1 = empty_strided_cuda((1, 4096), ...)`,
         `hyperquant_rice_linear_1f3a(x, qdata, buf0, out=buf1)`; the name is a `hq_inductor.ops.replay.CallSite` of the generated module.
Sizes.   Where they vary, nobody knows before what memory a call needs: `buf0 = hyperquant_rice_linear_52b0(x, qdata)`, a `VaryingCallSite`.
Not.     The call does more than allocate and launch (copies of inputs, library products); C++ wrappers and exported programs, which have no
         Python to call. Those keep the op.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import torch

from ..ops.ahead import memory_of
from ..ops.registry import CALL_SITES, cuda_function
from ..ops.replay import Slot
from .config import current_config

_IMPORTS = ("from hq_inductor.ops.registry import call_site, varying_call_site", "from hq_inductor.ops.replay import Slot")

_enabled = False


def enable_direct_calls(enabled: bool) -> None:
    """Whether graphs compiled from now on have such calls, where `PassConfig.direct_calls` does not say otherwise."""
    global _enabled
    _enabled = enabled
    if enabled:
        _register()


@functools.cache
def _register() -> None:
    """Tell Inductor, for good; each call asks whether it is to be made so."""
    from torch._inductor.lowering import add_layout_constraint, fallback_handler, register_lowering, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for name in CALL_SITES:
        packet = getattr(torch.ops.hyperquant, name)
        for op in (getattr(packet, overload) for overload in packet.overloads()):
            # as Inductor has it for ops that it knows nothing of
            constraint = tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
            if constraint is not None:
                add_layout_constraint(op, constraint)
            register_lowering(op, type_promotion_kind=None)(_lowering(op, fallback_handler(op, add_to_fallback_set=False)))


def _lowering(op: torch._ops.OpOverload, fallback: Callable) -> Callable:
    def lower(*args, **kwargs):
        call = _direct_call(op, args, kwargs) if _enabled and current_config().direct_calls else None
        return fallback(*args, **kwargs) if call is None else call

    return lower


def _direct_call(op: torch._ops.OpOverload, args: tuple, kwargs: dict):
    """Inductor's node of a call without the dispatcher, or None."""
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings
    from torch._inductor.utils import convert_shape_to_inductor
    from torch._inductor.virtualized import V

    graph = V.graph
    if graph.cpp_wrapper or graph.aot_mode or getattr(graph, "fx_wrapper", False):
        return None
    given = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
    arguments = [given[a.name] for a in op._schema.arguments]
    nodes: list = []

    def slot(value: object) -> object:
        if isinstance(value, list | tuple):
            return [slot(item) for item in value]
        if not isinstance(value, ir.IRNode):
            return value
        place = next((i for i, node in enumerate(nodes) if node is value), len(nodes))
        if place == len(nodes):
            nodes.append(value)
        return Slot(place)

    arguments = [slot(argument) for argument in arguments]
    devices = {node.get_device() for node in nodes}
    if len(devices) != 1 or None in devices or not _lowers_on(*devices):
        return None
    if not all(_is_constant(argument) for argument in arguments):
        return None
    realized = [ir.ExternKernel.realize_input(node) for node in nodes]
    described = [_described(node) for node in realized]
    (device,), varying = devices, [i for i, known in enumerate(described) if known is None]
    if varying:
        value = graph.current_node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        dtype, size = value.dtype, convert_shape_to_inductor(value.shape)
        text = f"varying_call_site({op._opname!r}, {varying}, {arguments!r})"
    else:
        memory = memory_of(cuda_function(op), tuple(described), arguments)
        if memory is None:
            return None
        if memory.scratch:
            empty = lowerings[torch.ops.aten.empty_strided.default]
            scratch = empty([memory.scratch], [1], dtype=torch.uint8, device=device)
            realized.append(ir.ExternKernel.realize_input(scratch))
        dtype, size = memory.dtype, list(memory.shape)
        text = f"call_site({op._opname!r}, {memory.scratch}, {arguments!r})"
    name = f"hyperquant_{op._opname}_{hashlib.sha256(repr((text, described)).encode()).hexdigest()[:8]}"
    layout, node = ir.FixedLayout(device, dtype, size), _direct_call_nodes()[bool(varying)]
    return ir.TensorBox.create(node(layout=layout, inputs=realized, python_kernel_name=name, site=f"{name} = {text}"))


def _is_constant(argument: object) -> bool:
    if isinstance(argument, list):
        return all(map(_is_constant, argument))
    return argument is None or isinstance(argument, Slot | bool | int | float | str)


def _lowers_on(device: torch.device) -> bool:
    return device.type == "cuda"


def _described(node) -> tuple | None:
    """(shape, strides, dtype, device) of one of Inductor's buffers or views, or None if they vary."""
    try:
        sizes, strides = list(node.get_size()), list(node.get_stride())
    except (AttributeError, NotImplementedError):
        return None
    if not all(getattr(number, "is_number", isinstance(number, int)) for number in (*sizes, *strides)):
        return None
    return tuple(map(int, sizes)), tuple(map(int, strides)), node.get_dtype(), node.get_device()


@functools.cache
def _direct_call_nodes() -> tuple[type, type]:
    """Of a `CallSite`, and of a `VaryingCallSite`, which allocates."""
    # Inductor, which needs a second to import, is there when this is called
    from torch._inductor import ir

    class DirectCall:
        """Defines its site, and calls it."""

        def __init__(self, site: str, **arguments) -> None:
            super().__init__(**arguments)
            self.site = site

        def codegen(self, wrapper) -> None:
            module = wrapper
            # functions within a module of generated code
            while hasattr(module, "parent_wrapper"):
                module = module.parent_wrapper
            # in the order in which they first come
            for line in (*_IMPORTS, self.site):
                module.add_import_once(line)
            super().codegen(wrapper)

    class DirectCallOut(DirectCall, ir.ExternKernelOut):
        pass

    class DirectCallAlloc(DirectCall, ir.ExternKernelAlloc):
        pass

    return DirectCallOut, DirectCallAlloc
