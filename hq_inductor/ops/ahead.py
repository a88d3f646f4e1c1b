"""Kernels compiled before their first launch, in threads, while the compiler is at work on the rest of a graph.

Why.         Triton compiles a kernel where it is launched first: at the first call of a compiled model, one after the other, after
             Inductor has finished. Those of a linear layer take a few seconds.
How.         `launch` with fake tensors compiles and does not launch. An op's CUDA function, run on fake tensors of a graph's shapes, thus
             compiles what the graph is going to launch, by the code that launches it. Passes, LLVM and ptxas run without the
             interpreter's lock. A launch waits for what is under way, so that nothing is compiled twice.
Invariants.  Nothing forks, nothing runs on the device. What fails here is logged, and left to the launch, which compiles as ever.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

log = logging.getLogger("hq_inductor.passes")

_under_way: set[Future] = set()
_seen: set[tuple] = set()
_locks: dict[tuple, threading.Lock] = defaultdict(threading.Lock)
_pool: ThreadPoolExecutor | None = None


def launch(kernel, grid: tuple[int, ...], first: torch.Tensor, *args, **options) -> None:
    """`kernel[grid](first, *args, **options)`; if `first` is a fake tensor, compile the kernel only."""
    if not isinstance(first, FakeTensor):
        if _under_way:
            wait_for_kernels()
        kernel[grid](first, *args, **options)
        return
    # a dtype stands for a pointer to aligned memory
    arguments = [arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in (first, *args)]
    kinds = tuple(argument for argument in arguments if isinstance(argument, torch.dtype))
    # layers that need the same one wait for each other
    with _locks[(kernel, kinds, tuple(sorted(options.items())))]:
        kernel.warmup(*arguments, grid=grid, **options)


def wait_for_kernels() -> None:
    """Wait until nothing is under way."""
    pending = tuple(_under_way)
    wait(pending)
    _under_way.difference_update(pending)


def compile_kernels_of(function: Callable, args: tuple, kwargs: Mapping) -> None:
    """Start to compile the kernels of a call of an op on CUDA, once for calls that are alike.

    Args:
        function: the op's CUDA function; its launches are `launch`.
        args, kwargs: what it is going to be called with: tensors of any kind, of which only shape, strides, dtype and device matter.
    """
    global _pool
    described = tree_map(lambda arg: _describe(arg) if isinstance(arg, torch.Tensor) else arg, (args, dict(kwargs)))
    key = (function, repr(described))
    if key in _seen:
        return
    _seen.add(key)
    if _pool is None:
        _pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="hq_inductor")
    _under_way.add(_pool.submit(_compile, function, *described))


class _Described(tuple):
    """(shape, strides, dtype, device) of a tensor; a leaf of trees."""


def _describe(tensor: torch.Tensor) -> _Described:
    return _Described((tuple(map(_number, tensor.shape)), tuple(map(_number, tensor.stride())), tensor.dtype, tensor.device))


def _number(size: int | torch.SymInt) -> int:
    """A size; of one that varies, what it was when the graph was traced. Adds no guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def _compile(function: Callable, args: tuple, kwargs: dict) -> None:
    try:
        device = next(leaf[3] for leaf in tree_leaves(args) if isinstance(leaf, _Described))
        with torch.cuda.device(device), FakeTensorMode(), torch.no_grad():
            function(*tree_map(_fake, args), **tree_map(_fake, kwargs))
    # whatever it is, it comes again at the launch, where it can be reported
    except Exception as error:
        log.info("kernels of %s not compiled ahead: %s", function.__name__, error)


def _fake(described):
    if not isinstance(described, _Described):
        return described
    shape, strides, dtype, device = described
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)
