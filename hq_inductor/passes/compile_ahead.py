"""The kernels of a graph's quantized layers and caches compile in workers while Inductor compiles the graph; no rewrite."""

from __future__ import annotations

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2

from ..ops.ahead import compile_kernels_of
from ..ops.registry import NAMESPACE, cuda_function
from .arithmetic import value_of

_NAMES = ("rice_linear", "rice_linear_fused", "codes_linear", "kv_attention", "kv_store", "kv_store_pair")


def compile_ahead(graph: fx.Graph) -> int:
    """Begin with what layers and caches launch on CUDA, for the sizes that the graph was traced with.

    Returns:
        How many calls on CUDA there are.
    """
    calls = 0
    for node in graph.nodes:
        op, kwargs = _call(node)
        if op is None or not all(value_of(used) is not None and value_of(used).is_cuda for used in node.all_input_nodes):
            continue
        calls += 1
        compile_kernels_of(cuda_function(op), (), fx.map_arg(kwargs, value_of))
    return calls


def _call(node: fx.Node) -> tuple[torch._ops.OpOverload | None, dict]:
    """(op, arguments by name) of a call of one of the ops, or (None, {})."""
    op = node.args[0] if node.target is auto_functionalized_v2 else node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != NAMESPACE or op._opname not in _NAMES:
        return None, {}
    names = [argument.name for argument in op._schema.arguments]
    if op is node.target:
        return op, dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    # an op that writes to its arguments has them in a list; views of what is in it, which caches do not pass, are left out
    if any(f"_{name}_{part}" in node.kwargs for name in names for part in ("size", "slice_dim")):
        return None, {}
    written = {name: node.kwargs.get(f"_{name}_base_index") for name in names}
    arguments = {name: node.kwargs[name] for name in names if name in node.kwargs}
    return op, arguments | {name: node.kwargs["_all_bases"][index] for name, index in written.items() if index is not None}
