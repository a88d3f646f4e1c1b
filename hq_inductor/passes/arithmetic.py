"""Recognizing pointwise arithmetic in a post-grad graph, whatever the order of operands and the dtype it is computed in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default


def is_call(node: object, *targets) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def value_of(node: object) -> torch.Tensor | None:
    """The fake tensor of a node; None for sizes, and for what another pass has put there without one."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def dtype_of(node: object) -> torch.dtype | None:
    value = value_of(node)
    return None if value is None else value.dtype


def same_shape(*nodes: fx.Node) -> bool:
    """Whether nodes are tensors of one shape. Symbolic sizes are compared as expressions: no guard is added."""
    shapes = [None if value_of(node) is None else tuple(map(str, value_of(node).shape)) for node in nodes]
    return shapes[0] is not None and all(shape == shapes[0] for shape in shapes)


def widened(node: fx.Node) -> fx.Node:
    """What a node was before it was converted to a wider dtype, which loses nothing."""
    if is_call(node, _CONVERT):
        narrow, wide = dtype_of(node.args[0]), dtype_of(node)
        if narrow is not None and wide is not None and narrow.is_floating_point and narrow.itemsize < wide.itemsize:
            return node.args[0]
    return node


def rounded_from(node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    """The fp32 value that was rounded to `dtype`, or None; for fp32, the node itself."""
    if dtype == torch.float32:
        return node if dtype_of(node) == dtype else None
    return node.args[0] if is_call(node, _CONVERT) and dtype_of(node) == dtype and dtype_of(node.args[0]) == torch.float32 else None


def operands(node: object, *targets) -> Iterator[tuple]:
    """Both orders of a commutative call's two operands; nothing if it is no such call, or scales one of them."""
    if is_call(node, *targets) and len(node.args) == 2 and not node.kwargs:
        a, b = node.args
        yield a, b
        yield b, a


def scaled(node: object, factor: float) -> fx.Node | None:
    """`a` of `factor * a`, or None."""
    for a, b in operands(node, aten.mul.Tensor, aten.mul.Scalar):
        if isinstance(a, fx.Node) and isinstance(b, float | int) and abs(b - factor) < 1e-9:
            return a
    return None


def increased(node: object) -> tuple[fx.Node, float] | None:
    """(`a`, c) of `a + c`, or None."""
    for a, b in operands(node, aten.add.Tensor, aten.add.Scalar):
        if isinstance(a, fx.Node) and isinstance(b, float | int):
            return a, float(b)
    return None


def is_square(node: object, of: fx.Node) -> bool:
    if is_call(node, aten.pow.Tensor_Scalar):
        return node.args[0] is of and node.args[1] == 2
    return is_call(node, aten.mul.Tensor) and node.args == (of, of)


def is_parameter(node: object) -> bool:
    """Whether a node is there before the graph runs."""
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")
