"""Layers that read the same activations become one op.

Why.     One rotation and quantization instead of one each, one launch over all tiles, and for large batches one library product.
Before.  `q = rice_linear(x, wq, s, bq, ...)`, `k = rice_linear(x, wk, s, bk, ...)`, `v = rice_linear(x, wv, s, bv, ...)`
After.   `y = rice_linear_fused(x, [wq, wk, wv], s, [bq, bk, bv], ...)`, `q, k, v = split_with_sizes(y, [Nq, Nk, Nv], -1)`, which are views.
         A sibling that leaves the graph is copied, so that it shares no memory with the others.
Not.     `act_pre_scale`, lattice, tile, seed or mma differ; or an argument is computed after the first of the siblings. Rates may differ.
         No more than four at a time: weights that are decoded together are in memory together.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from .graph_pass import GraphPass, Rewriting
from .linear_node import LinearNode, erase_unused, insert_call

aten = torch.ops.aten

MAX_SIBLINGS = 4
_SHARED = ("act_pre_scale", "lattice", "tile", "seed", "mma")


class MergeSiblingsPass(GraphPass):
    name = "merge_siblings"

    def __call__(self, rewriting: Rewriting) -> None:
        readers: dict[fx.Node, list[LinearNode]] = {}
        for linear in LinearNode.all_of(rewriting.graph):
            if len(linear.qdata) == 1 and linear.prologue == "none" and linear.residual is None:
                readers.setdefault(linear.x, []).append(linear)
        for linears in readers.values():
            if len(linears) > 1 and rewriting.pays(self.name, linears[0]):
                self._merge_readers(rewriting, linears)

    def _merge_readers(self, rewriting: Rewriting, linears: list[LinearNode]) -> None:
        families: dict[tuple, list[LinearNode]] = {}
        for linear in linears:
            families.setdefault(tuple(getattr(linear, name) for name in _SHARED), []).append(linear)
        kinds = list(families)
        for name, values in zip(_SHARED, zip(*kinds, strict=True), strict=True):
            if len(set(values)) > 1:
                rewriting.leave(self.name, linears[0].node, f"{name} differs")
        order = {node: place for place, node in enumerate(rewriting.graph.nodes)}
        for family in families.values():
            first = order[family[0].node]
            ready = [linear for linear in family if all(order[used] < first for used in linear.node.all_input_nodes)]
            if len(ready) < len(family):
                rewriting.leave(self.name, family[0].node, "a weight or bias is computed after the first sibling")
            for start in range(0, len(ready), MAX_SIBLINGS):
                chunk = ready[start : start + MAX_SIBLINGS]
                if len(chunk) > 1:
                    rewriting.made(self.name, _merge(chunk))


def _merge(siblings: list[LinearNode]) -> fx.Node:
    first = siblings[0]
    before = first.node
    merged = first.insert(
        before,
        qdata=tuple(linear.qdata[0] for linear in siblings),
        bias=tuple(linear.bias[0] for linear in siblings),
        code=tuple(linear.code[0] for linear in siblings),
    )
    rows = [linear.rows[0] for linear in siblings]
    split = insert_call(before, aten.split_with_sizes.default, (merged, rows, -1), first.node)
    for i, linear in enumerate(siblings):
        part = insert_call(before, operator.getitem, (split, i), linear.node)
        if _leaves_the_graph(linear.node):
            part = insert_call(before, aten.clone.default, (part,), linear.node, {"memory_format": torch.contiguous_format})
        linear.node.replace_all_uses_with(part)
    for linear in siblings:
        erase_unused(linear.node)
    return merged


def _leaves_the_graph(node: fx.Node) -> bool:
    """Whether a node or a view of it is an output."""
    return any(user.op == "output" or (_is_view(user) and _leaves_the_graph(user)) for user in node.users)


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    # these may be views, though their schemas do not say so
    if node.target in (aten.reshape.default, aten._unsafe_view.default):
        return True
    return any(result.alias_info is not None and not result.alias_info.is_write for result in node.target._schema.returns)
