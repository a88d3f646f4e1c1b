"""The kernels of a graph's quantized layers compile in workers while Inductor compiles the graph; no rewrite."""

from __future__ import annotations

from torch import fx

from ..ops.ahead import compile_kernels_of
from ..ops.registry import cuda_function
from .linear_node import LinearNode


def compile_ahead(graph: fx.Graph) -> int:
    """Start with what the graph's layers launch on CUDA, for the sizes that it was traced with.

    Returns:
        How many layers there are on CUDA.
    """
    layers = [linear.node for linear in LinearNode.all_of(graph) if linear.value("x").is_cuda]
    for node in layers:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
        compile_kernels_of(cuda_function(node.target), args, kwargs)
    return len(layers)
