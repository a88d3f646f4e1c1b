"""A gated activation that only feeds a quantized layer moves into the layer's first kernel.

Why.     The kernel that rotates reads gate and up instead of their product, which then is never in memory.
Before.  `y = silu(gate) * up`, or gelu with or without tanh, as decomposed; `rice_linear(y, ...)`
After.   `rice_linear_fused(up, ..., gate=gate, prologue="silu_mul", ...)`; both may be views of one merged layer's output.
Not.     Anything else reads y; gate and up have other shapes or dtypes than y.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from .arithmetic import aten, dtype_of, increased, is_call, operands, rounded_from, same_shape, scaled, widened
from .graph_pass import GraphPass, Rewriting
from .linear_node import LinearNode, erase_unused


class FuseGatePass(GraphPass):
    name = "fuse_gate"

    def __call__(self, rewriting: Rewriting) -> None:
        for linear in LinearNode.all_of(rewriting.graph):
            found = match_gate(linear.x) if linear.prologue == "none" else None
            if found is None:
                continue
            prologue, gate, up = found
            if len(linear.x.users) > 1:
                rewriting.leave(self.name, linear.node, "other nodes read it")
            elif rewriting.pays(self.name, linear):
                fused = linear.insert(linear.node, x=up, gate=gate, prologue=prologue)
                linear.node.replace_all_uses_with(fused)
                erase_unused(linear.node)
                rewriting.made(self.name, fused)


def match_gate(y: fx.Node) -> tuple[str, fx.Node, fx.Node] | None:
    """(prologue, gate, up) of a product `y` of an activation and something else, or None."""
    dtype = dtype_of(y)
    for activated, up in operands(y, aten.mul.Tensor):
        if not (isinstance(activated, fx.Node) and isinstance(up, fx.Node) and same_shape(activated, up, y)):
            continue
        if dtype_of(activated) != dtype or dtype_of(up) != dtype:
            continue
        found = _match_activation(activated, dtype)
        if found is not None:
            return (*found, up)
    return None


def _match_activation(node: fx.Node, dtype: torch.dtype) -> tuple[str, fx.Node] | None:
    """(prologue, gate) of an activation computed in fp32 and rounded, or of one that is not decomposed."""
    if is_call(node, aten.silu.default):
        return "silu_mul", node.args[0]
    body = rounded_from(node, dtype)
    if body is None:
        return None
    for name, match in (("silu_mul", _silu), ("gelu_mul", _gelu), ("gelu_tanh_mul", _gelu_tanh)):
        wide = match(body)
        gate = wide and (wide if dtype == torch.float32 else widened(wide))
        if gate and dtype_of(gate) == dtype:
            return name, gate
    return None


def _silu(node: fx.Node) -> fx.Node | None:
    """g of `g / (1 + exp(-g))` or `g * sigmoid(g)`."""
    if is_call(node, aten.div.Tensor) and not node.kwargs:
        g, below = node.args
        found = increased(below)
        if found and found[1] == 1 and is_call(found[0], aten.exp.default):
            negated = found[0].args[0]
            return g if is_call(negated, aten.neg.default) and negated.args[0] is g else None
    for g, sigmoid in operands(node, aten.mul.Tensor):
        if is_call(sigmoid, aten.sigmoid.default) and sigmoid.args[0] is g:
            return g
    return None


def _half_times_one_plus(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(g, f) of `0.5 * g * (1 + f)`."""
    for half, rest in operands(node, aten.mul.Tensor):
        g, found = scaled(half, 0.5), increased(rest)
        if g is not None and found and found[1] == 1:
            return g, found[0]
    return None


def _gelu(node: fx.Node) -> fx.Node | None:
    found = _half_times_one_plus(node)
    if found and is_call(found[1], aten.erf.default) and scaled(found[1].args[0], math.sqrt(0.5)) is found[0]:
        return found[0]
    return None


def _gelu_tanh(node: fx.Node) -> fx.Node | None:
    found = _half_times_one_plus(node)
    if not found or not is_call(found[1], aten.tanh.default):
        return None
    g, argument = found[0], scaled(found[1].args[0], math.sqrt(2 / math.pi))
    for first, second in operands(argument, aten.add.Tensor):
        if first is g and isinstance(second, fx.Node):
            cube = scaled(second, 0.044715)
            if cube is not None and _is_cube(cube, g):
                return g
    return None


def _is_cube(node: fx.Node, g: fx.Node) -> bool:
    if is_call(node, aten.pow.Tensor_Scalar):
        return node.args == (g, 3)
    return any(a is g and is_call(b, aten.mul.Tensor) and b.args == (g, g) for a, b in operands(node, aten.mul.Tensor))
