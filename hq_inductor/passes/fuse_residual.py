"""An addition to a quantized layer's output moves into the layer's last kernel.

Why.     The sum is added to the fp32 result before it is rounded; its kernel and one round trip through memory go away. With the norm after
         it in the next layer's first kernel, nothing is left between the two layers.
Before.  `y = rice_linear(x, w, ...) + residual`
After.   `y = rice_linear_fused(x, [w], ..., residual=residual, ...)`
Not.     Anything else reads the layer's output, the residual is broadcast or of another dtype, or the layer was merged with siblings.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from .arithmetic import aten, dtype_of, operands, same_shape
from .graph_pass import GraphPass, Rewriting
from .linear_node import LinearNode, erase_unused


class FuseResidualPass(GraphPass):
    name = "fuse_residual"

    def __call__(self, rewriting: Rewriting) -> None:
        for linear in LinearNode.all_of(rewriting.graph):
            found = _match_addition(linear.node) if len(linear.qdata) == 1 and linear.residual is None else None
            if found is None:
                continue
            addition, residual = found
            if len(linear.node.users) > 1:
                rewriting.leave(self.name, linear.node, "other nodes read the layer's output")
            elif rewriting.pays(self.name, linear):
                fused = dataclasses.replace(linear, node=addition).insert(addition, residual=residual)
                addition.replace_all_uses_with(fused)
                erase_unused(addition)
                rewriting.made(self.name, fused)


def _match_addition(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(sum, what a layer's output is added to), or None."""
    for user in node.users:
        for a, b in operands(user, aten.add.Tensor):
            if a is node and isinstance(b, fx.Node) and b is not node and same_shape(a, b, user) and dtype_of(a) == dtype_of(b):
                return user, b
    return None
