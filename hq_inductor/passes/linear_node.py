"""A quantized layer in an FX graph, `hyperquant::rice_linear` or `rice_linear_fused`, with its arguments by name."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

_LINEAR = (torch.ops.hyperquant.rice_linear.default, torch.ops.hyperquant.rice_linear.no_grad)
_FUSED = torch.ops.hyperquant.rice_linear_fused.default

# what tells a reader where a node comes from
_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "seq_nr")


@dataclass(frozen=True, eq=False)
class LinearNode:
    """Arguments of the layer at `node`, as `rice_linear_fused` names them."""

    node: fx.Node
    x: fx.Node
    qdata: tuple[fx.Node, ...]
    act_pre_scale: fx.Node | None
    bias: tuple[fx.Node | None, ...]
    lattice: str
    tile: int
    code: tuple[int, ...]
    seed: int
    mma: str
    gate: fx.Node | None = None
    norm_weight: fx.Node | None = None
    norm_bias: fx.Node | None = None
    residual: fx.Node | None = None
    prologue: str = "none"
    eps: float = 0.0

    @classmethod
    def of(cls, node: fx.Node) -> LinearNode | None:
        """The layer at a node; None if there is none, or if another pass has left out what its arguments are."""
        if node.op != "call_function" or node.target not in (*_LINEAR, _FUSED):
            return None
        if any("val" not in known.meta for known in (node, *node.all_input_nodes)):
            return None
        # arguments equal to their default are left out
        given = {argument.name: argument.default_value for argument in node.target._schema.arguments if argument.has_default_value()}
        given |= dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
        for name in ("qdata", "bias", "code"):
            given[name] = (given[name],) if node.target in _LINEAR else tuple(given[name])
        return cls(node, **given)

    @classmethod
    def all_of(cls, graph: fx.Graph) -> Iterator[LinearNode]:
        """Layers in the graph's order."""
        for node in list(graph.nodes):
            linear = cls.of(node)
            if linear is not None:
                yield linear

    def value(self, name: str) -> torch.Tensor:
        """The fake tensor of an argument."""
        return getattr(self, name).meta["val"]

    @property
    def rows(self) -> tuple[int, ...]:
        """Output features of each sibling."""
        return tuple(q.meta["val"].shape[0] for q in self.qdata)

    def insert(self, before: fx.Node, **changes) -> fx.Node:
        """A `rice_linear_fused` node with changed arguments, in front of another node."""
        changed = dataclasses.replace(self, **changes)
        names = [argument.name for argument in _FUSED._schema.arguments]
        arguments = {name: getattr(changed, name) for name in names}
        arguments |= {name: list(arguments[name]) for name in ("qdata", "bias", "code")}
        return insert_call(before, _FUSED, tuple(arguments.values()), self.node)


def has_linear(graph: fx.Graph) -> bool:
    return any(graph.find_nodes(op="call_function", target=target, sort=False) for target in (*_LINEAR, _FUSED))


def without_autograd(graph: fx.Graph) -> bool:
    """Call layers by the overload without gradients, which the graph has left behind; whether there was something to change."""
    default, no_grad = _LINEAR
    nodes = graph.find_nodes(op="call_function", target=default)
    for node in nodes:
        node.target = no_grad
    return bool(nodes)


def insert_call(before: fx.Node, target, args: tuple, origin: fx.Node, kwargs: dict | None = None) -> fx.Node:
    """A call in front of a node, with the fake tensor that it gives; `origin` says where it comes from."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    values = fx.map_arg(args, lambda argument: argument.meta["val"])
    node.meta = {key: origin.meta[key] for key in _ORIGIN if key in origin.meta}
    with origin.meta["val"].fake_mode:
        node.meta["val"] = target(*values, **(kwargs or {}))
    return node


def erase_unused(node: fx.Node) -> None:
    """Remove a node and what only it used, as far as that is pure."""
    pure = node.target is operator.getitem or (isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable)
    if node.users or node.op != "call_function" or not pure:
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for used in inputs:
        erase_unused(used)
