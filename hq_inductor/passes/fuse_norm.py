"""A norm that only feeds a quantized layer moves into the layer's first kernel.

Why.     The kernel that rotates reads the same rows; the norm's own kernel, its output in memory and the launch between go away.
Before.  `y = rms_norm(h) * weight`, or `(h - mean(h)) / sqrt(var(h) + eps) * weight + bias`, as decomposed; `rice_linear(y, ...)`
         Or a norm times `1 + weight`: Gemma's; or with a bias, both broadcast over tokens, a diffusion transformer's modulation by time.
After.   `rice_linear_fused(h, ..., norm_weight=weight, norm_bias=bias, prologue="rms_norm", eps=eps, ...)`; for `1 + weight`
         `"rms_norm_1p"` or `"layer_norm_1p"`
Not.     Anything else reads y (a LoRA branch, an output): it has to be computed anyway. A weight or bias `[K]` is computed in another way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from .arithmetic import aten, dtype_of, increased, is_call, is_parameter, is_square, operands, rounded_from, same_shape, value_of, widened
from .graph_pass import GraphPass, Rewriting
from .linear_node import LinearNode, erase_unused


@dataclass(frozen=True)
class Norm:
    """A norm of `source` over its last dimension; `weight` and `bias` are `[K]`, or broadcast over tokens."""

    source: fx.Node
    name: str
    eps: float
    weight: fx.Node | None = None
    bias: fx.Node | None = None


class FuseNormPass(GraphPass):
    name = "fuse_norm"

    def __call__(self, rewriting: Rewriting) -> None:
        for linear in LinearNode.all_of(rewriting.graph):
            if linear.prologue != "none":
                continue
            norm = match_norm(linear.x)
            if norm is None:
                continue
            vectors = [node for node in (norm.weight, norm.bias) if node is not None and value_of(node).dim() == 1]
            if not all(map(is_parameter, vectors)):
                rewriting.leave(self.name, linear.node, "its weight or bias is computed")
            elif len(linear.x.users) > 1:
                rewriting.leave(self.name, linear.node, "other nodes read it")
            elif rewriting.pays(self.name, linear):
                fused = linear.insert(
                    linear.node, x=norm.source, norm_weight=norm.weight, norm_bias=norm.bias, prologue=norm.name, eps=norm.eps
                )
                linear.node.replace_all_uses_with(fused)
                erase_unused(linear.node)
                rewriting.made(self.name, fused)


def match_norm(y: fx.Node) -> Norm | None:
    """The norm whose result is `y`, or None."""
    dtype = dtype_of(y)
    if dtype != torch.float32:
        # rounded, then multiplied: Hugging Face's RMSNorm
        for weight, normed in operands(y, aten.mul.Tensor):
            if _is_vector(weight, y) and isinstance(normed, fx.Node):
                inner = rounded_from(normed, dtype)
                norm = inner and _match_normalized(inner, dtype)
                if norm and norm.name == "rms_norm" and dtype_of(weight) == dtype:
                    return Norm(norm.source, "rms_norm_cast", norm.eps, weight)
        # a modulation in the activations' dtype: the norm is rounded, and what comes after it
        norm = _match_scaled(y, y, dtype, lambda normed: isinstance(normed, fx.Node) and rounded_from(normed, dtype))
        if norm is not None and norm.name.endswith("_1p"):
            return norm
    body = rounded_from(y, dtype)
    return None if body is None else _match_scaled(body, y, dtype, lambda normed: normed)


def _match_scaled(body: fx.Node, y: fx.Node, dtype: torch.dtype, before_rounding: Callable) -> Norm | None:
    """The norm that is `body` with its gain and bias; `before_rounding` leads from what they are applied to to its fp32 value."""
    candidates = [(body, None)]
    candidates += [(inner, widened(bias)) for inner, bias in operands(body, aten.add.Tensor) if _is_gain(bias, y)]
    for shifted, bias in candidates:
        gains = [(shifted, None)]
        gains += [(inner, widened(weight)) for inner, weight in operands(shifted, aten.mul.Tensor) if _is_gain(weight, y)]
        for normed, weight in gains:
            inner = before_rounding(normed)
            norm = _match_normalized(inner, dtype) if inner else None
            if norm is None or (bias is not None and norm.name != "layer_norm"):
                continue
            name, plus_one = norm.name, increased(weight) if weight is not None else None
            if plus_one and plus_one[1] == 1 and _is_gain(plus_one[0], y):
                name, weight = f"{norm.name}_1p", widened(plus_one[0])
            if weight is None or bias is None or same_shape(weight, bias):
                return Norm(norm.source, name, norm.eps, weight, bias)
    return None


def _is_vector(node: object, y: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and value.dim() == 1 and str(value.shape[0]) == str(value_of(y).shape[-1])


def _is_gain(node: object, y: fx.Node) -> bool:
    """Whether a node is `[K]`, or `[*lead, 1, ..., K]` for the activations `[*lead, ..., K]`."""
    value, whole = value_of(node), tuple(map(str, value_of(y).shape))
    if value is None or value.dim() != len(whole) or value.dim() == 1:
        return _is_vector(node, y)
    own = tuple(map(str, value.shape))
    first = next((d for d in range(len(own) - 1) if own[d] != whole[d]), len(own) - 1)
    return own[-1] == whole[-1] and set(own[first:-1]) == {"1"}


def _match_normalized(node: object, dtype: torch.dtype) -> Norm | None:
    """`h * rsqrt(mean(h^2) + eps)` or `(h - mean(h)) * rsqrt(var(h) + eps)`, h of `dtype` computed with in fp32."""
    for centered, deviation in operands(node, aten.mul.Tensor):
        found = increased(deviation.args[0]) if is_call(deviation, aten.rsqrt.default) else None
        if found is None or value_of(centered) is None:
            continue
        spread, eps = found
        h, name = centered, "rms_norm"
        if is_call(spread, aten.mean.dim):
            if not (is_square(spread.args[0], h) and _over_last(spread, h)):
                continue
        else:
            h, name = _match_centered(centered, spread), "layer_norm"
        source = h and (h if dtype == torch.float32 else widened(h))
        if source and dtype_of(h) == torch.float32 and dtype_of(source) == dtype and same_shape(source, node):
            return Norm(source, name, eps)
    return None


def _match_centered(centered: fx.Node, variance: fx.Node) -> fx.Node | None:
    """h of `h - mean(h)` and `var(h)`, or None."""
    if not is_call(centered, aten.sub.Tensor) or centered.kwargs:
        return None
    h, mean = centered.args
    if not (is_call(variance, operator.getitem) and is_call(mean, operator.getitem)):
        return None
    moments = variance.args[0]
    if mean.args != (moments, 1) or variance.args != (moments, 0) or not is_call(moments, aten.var_mean.correction):
        return None
    return h if moments.args[0] is h and moments.kwargs.get("correction") == 0 and _over_last(moments, h) else None


def _over_last(reduction: fx.Node, h: fx.Node) -> bool:
    """Whether a reduction is over the last dimension only, and keeps it."""
    named = dict(zip((argument.name for argument in reduction.target._schema.arguments), reduction.args, strict=False)) | reduction.kwargs
    last = value_of(h).dim() - 1
    return named.get("keepdim") is True and [d % (last + 1) for d in named.get("dim") or ()] == [last]
