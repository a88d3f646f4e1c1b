"""Kernels compiled before their first launch, in Inductor's worker processes, while Inductor is at work on the rest of a graph.

Why.         Triton compiles a kernel where it is launched first: at the first call of a compiled model, one after the other, after
             Inductor has finished. Those of a linear layer take a few seconds.
How.         `launch` with fake tensors notes what is to be compiled, and launches nothing. An op's CUDA function, run on fake tensors of a
             graph's shapes, thus notes what the graph is going to launch, by the code that launches it. Workers compile it into Triton's
             cache on disk, and the first launch reads it from there. Not in threads: Triton's compiler is not made for several.
Invariants.  Nothing is launched, and workers do not touch the device. What fails here is logged, and left to the launch, which compiles
             as ever.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from .replay import Allocations, filled, recorder

log = logging.getLogger("hq_inductor.passes")


@dataclass(frozen=True)
class Job:
    """One kernel to compile: where it is, its arguments, dtypes in place of pointers, its grid and its options."""

    module: str
    name: str
    arguments: tuple
    grid: tuple[int, ...]
    options: tuple[tuple[str, object], ...]

    @property
    def key(self) -> tuple:
        """The same for jobs that compile to the same binary: Triton looks at sizes only so far."""
        kinds = tuple((value == 1, value % 16 == 0, value >= 2**31) if type(value) is int else value for value in self.arguments)
        return (self.module, self.name, repr(kinds), repr(self.options))

    def warm_up(self) -> str:
        """Compile for the active driver's target, or read from the cache on disk; the key there."""
        _settle_keys(self.module)
        kernel = getattr(importlib.import_module(self.module), self.name)
        return kernel.warmup(*self.arguments, grid=self.grid, **dict(self.options)).hash


_settled: set[str] = set()


def _settle_keys(module: str) -> None:
    """Have Triton compute the cache keys of a module's functions, those of what they call first.

    A key depends on the globals that a function's callees use, if their keys are there already: in another order, another key, and workers
    would compile for nothing.
    """
    if module in _settled:
        return
    _settled.add(module)
    functions = [value for value in vars(importlib.import_module(module)).values() if hasattr(value, "cache_key")]
    for function in functions:
        _settle_keys(function.__module__)
    for function in functions:
        if function.__module__ == module:
            function.cache_key  # noqa: B018


_noted = threading.local()
_seen: set[tuple] = set()
# jobs at work, and the cache they write to
_under_way: list[tuple[Job, str, Future]] = []


def launch(kernel, grid: tuple[int, ...], first: torch.Tensor, *args, **options) -> None:
    """`kernel[grid](first, *args, **options)`; if `first` is a fake tensor, the kernel is only noted for compilation."""
    if not isinstance(first, FakeTensor):
        _settle_keys(kernel.fn.__module__)
        if _under_way:
            wait_for_kernels()
        compiled = kernel[grid](first, *args, **options)
        noted = recorder()
        if noted is not None:
            given = (first, *args)
            rest = kernel.arg_names[len(given) :]
            noted.launched(compiled, grid, [*given, *(options[name] for name in rest)])
        return
    # a dtype stands for a pointer to aligned memory
    arguments = tuple(arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in (first, *args))
    _noted.jobs.append(Job(kernel.fn.__module__, kernel.fn.__name__, arguments, grid, tuple(options.items())))


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor starts at a multiple of 16 bytes; fake ones do."""
    return isinstance(tensor, FakeTensor) or tensor.data_ptr() % 16 == 0


def jobs_of(function: Callable, args: tuple, kwargs: Mapping) -> list[Job]:
    """What a call of an op on CUDA launches, as far as fake tensors lead.

    Args:
        function: the op's CUDA function; its launches are `launch`.
        args, kwargs: what it is going to be called with: tensors of any kind, of which only shape, strides, dtype and device matter.
    """
    with _fake_tensors(function.__name__):
        args, kwargs = tree_map(lambda arg: _fake(arg) if isinstance(arg, torch.Tensor) else arg, (args, dict(kwargs)))
        function(*args, **kwargs)
    return _noted.jobs


@dataclass(frozen=True)
class Memory:
    """What a call of an op needs: its result, contiguous, and bytes for what its kernels hand to each other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    scratch: int


def memory_of(function: Callable, tensors: tuple[tuple, ...], arguments: list) -> Memory | None:
    """The memory of a call that only allocates and launches; None if it does more.

    Args:
        function: as of `jobs_of`; its result is a tensor of its own.
        tensors: (shape, strides, dtype, device) of each that it is called with.
        arguments: what it is called with, a `Slot` for each tensor.
    """
    key = (function, tensors, repr(arguments))
    if key not in _memory:
        _memory[key] = None
        with _fake_tensors(function.__name__):
            made = [torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype, device in tensors]
            arguments = filled(arguments, made)
            with Allocations() as noted:
                out = function(*arguments)
            scratch = noted.scratch(out)
            if scratch is not None and out.numel():
                _memory[key] = Memory(tuple(out.shape), out.dtype, scratch)
    return _memory[key]


_memory: dict[tuple, Memory | None] = {}


@contextlib.contextmanager
def _fake_tensors(name: str) -> Iterator[None]:
    """Tensors made within are fake, and what is launched on them is noted anew."""
    _noted.jobs = []
    with _left_to_the_launch(name), FakeTensorMode(), torch.no_grad():
        yield


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    shape, strides = map(_number, tensor.shape), map(_number, tensor.stride())
    return torch.empty_strided(tuple(shape), tuple(strides), dtype=tensor.dtype, device=tensor.device)


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}"


def _number(size: int | torch.SymInt) -> int:
    """A size; of one that varies, what it was when the graph was traced. Adds no guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def compile_kernels_of(function: Callable, args: tuple, kwargs: Mapping) -> None:
    """Have the kernels of a call compiled, arguments as of `jobs_of`; each kernel once."""
    with _left_to_the_launch(function.__name__):
        # a model's layers are alike
        call = (function, repr(tree_map(lambda arg: _described(arg) if isinstance(arg, torch.Tensor) else arg, (args, dict(kwargs)))))
        if call in _seen:
            return
        _seen.add(call)
        for job in jobs_of(function, args, kwargs):
            if job.key not in _seen:
                _seen.add(job.key)
                cache = _cache_dir()
                _under_way.append((job, cache, _pool().submit(compile_job, job, _target(), cache)))


def wait_for_kernels() -> None:
    """Wait until nothing is under way, and read what was compiled."""
    jobs = _under_way.copy()
    _under_way.clear()
    for job, cache, future in jobs:
        with _left_to_the_launch(job.name):
            written = future.result()
            with _cache(cache):
                read = job.warm_up()
            if read != written:
                log.info("%s was compiled twice: a worker's key is %s, this process's %s", job.name, written, read)


def prepare_workers() -> None:
    """Have workers import what they need, so that they have when the first kernel comes.

    All of them: the one that has waited longest gets the next job, so one that is prepared would be the last to get a kernel.
    """
    with _left_to_the_launch("all layers"):
        from torch._inductor.async_compile import AsyncCompile, get_compile_threads

        # Inductor compiles in this process until a worker has answered: let that not wait for the imports
        AsyncCompile.use_process_pool()
        for _ in range(get_compile_threads()):
            _pool().submit(importlib.import_module, "hq_inductor.ops.fused")


@contextlib.contextmanager
def _left_to_the_launch(name: str) -> Iterator[None]:
    try:
        yield
    # whatever it is, it comes again at the launch, where it can be reported
    except Exception as error:
        log.info("kernels of %s not compiled ahead: %s: %s", name, type(error).__name__, error)


def _pool():
    """Inductor's worker processes, which are there before CUDA is."""
    from torch._inductor.async_compile import AsyncCompile

    _take_assembler_of_workers()
    return AsyncCompile.process_pool()


@functools.cache
def _take_assembler_of_workers() -> None:
    """Workers take the assembler that torch brings, if it does, and its version is part of a kernel's key: so do we from here on."""
    from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
    from triton.backends.nvidia.compiler import get_ptxas_version

    _set_triton_ptxas_path()
    # Triton remembers the version of its own, if one was asked for before: by a kernel launched here, or by Inductor, which asks when it
    # generates code, and takes torch's assembler only after that
    get_ptxas_version.cache_clear()


def _target():
    from triton.runtime import driver

    return driver.active.get_current_target()


def _cache_dir() -> str:
    """Where Triton looks once a graph of Inductor's runs."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    return triton_cache_dir(torch.cuda.current_device())


@contextlib.contextmanager
def _cache(directory: str) -> Iterator[None]:
    from triton import knobs

    with knobs.cache.scope():
        knobs.cache.dir = directory
        yield


class _Target:
    """The part of a Triton driver that compilation needs, without a device."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def compile_job(job: Job, target, cache: str) -> str:
    """What a worker does: compile for a target (Triton's `GPUTarget`) into the cache in a directory; the key there."""
    from triton.runtime import driver

    # as it was: the worker compiles Inductor's kernels too. `active` would look for a device
    before = driver._active
    driver.set_active(_Target(target))
    try:
        with _cache(cache):
            return job.warm_up()
    finally:
        driver._active = before
