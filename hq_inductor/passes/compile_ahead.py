"""The kernels of a graph's quantized layers compile in workers while Inductor compiles the graph; no rewrite."""

from __future__ import annotations

import torch
from torch import fx

from ..ops.ahead import compile_kernels_of
from ..ops.registry import cuda_function
from .arithmetic import value_of

_OPS = torch.ops.hyperquant
_LAYERS = (_OPS.rice_linear.default, _OPS.rice_linear.no_grad, _OPS.rice_linear_fused.default, _OPS.codes_linear.default)


def compile_ahead(graph: fx.Graph) -> int:
    """Begin with what the layers launch on CUDA, for the sizes that the graph was traced with.

    Returns:
        How many layers there are on CUDA.
    """
    layers = [node for target in _LAYERS for node in graph.find_nodes(op="call_function", target=target)]
    layers = [node for node in layers if all(value_of(used) is not None and value_of(used).is_cuda for used in node.all_input_nodes)]
    for node in layers:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        compile_kernels_of(cuda_function(node.target), args, kwargs)
    return len(layers)
