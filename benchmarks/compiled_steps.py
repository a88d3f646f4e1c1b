"""Compile a step, and time it with everything the host does for it."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_inductor_cache

# graph: compiled, then captured in one CUDA graph by hand
MODES = ("graph", "reduce-overhead", "default", "eager")
SAMPLES = 7


@contextlib.contextmanager
def cold_caches(mode: str) -> Iterator[None]:
    """Neither Dynamo's nor Inductor's nor Triton's caches serve what was compiled before."""
    torch._dynamo.reset()
    with contextlib.nullcontext() if mode == "eager" else fresh_inductor_cache():
        yield


def start_compiler(mode: str, device: torch.device) -> None:
    """Start Inductor's workers, and wait for them: the first compilation in a process would be charged for that."""
    if mode != "eager":
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        AsyncCompile.wait_pool_ready()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """One CUDA graph of a call that has run before."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay() -> None:
        graph.replay()

    return replay


def compile_step(call: Callable[[], object], mode: str, device: torch.device) -> tuple[Callable[[], object], float]:
    """The compiled call, ready to be timed, and the seconds that compiling and the first run took; in mode `"eager"` the call itself."""
    if mode == "eager":
        return call, 0.0
    begin = time.perf_counter()
    compiled = torch.compile(call, fullgraph=True, dynamic=False, mode=None if mode == "graph" else mode)
    compiled()
    synchronize(device)
    seconds = time.perf_counter() - begin
    if mode == "graph" and device.type == "cuda":
        return capture(compiled), seconds
    # Inductor's graphs record in the second run
    compiled()
    return compiled, seconds


def time_ms(
    call: Callable[[], object],
    steps: int,
    device: torch.device,
    rewind: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median over samples of the mean milliseconds of `steps` calls in a row, host included. `rewind` runs before each sample."""
    samples = []
    for _ in range(SAMPLES):
        rewind()
        synchronize(device)
        begin = clock()
        for _ in range(steps):
            call()
        synchronize(device)
        samples.append(1e3 * (clock() - begin) / steps)
    return statistics.median(samples)
