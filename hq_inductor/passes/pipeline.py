"""The passes in their order.

1. `merge_siblings` first: afterwards one op reads what several read before, so that what feeds it can be seen to feed nothing else.
2. `fuse_norm`, 3. `fuse_gate`: what comes before a layer. They exclude each other, and their order does not matter.
4. `fuse_residual` last: it takes single layers, which merged ones no longer are.

What is still a single layer then is called by the overload `no_grad`: the graph is below autograd, whose Python layer is paid for per call.
After all that, `compile_ahead` begins with the kernels of the layers as they are then.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import astuple
from pathlib import Path

import torch
from torch import fx

from .config import current_config
from .fuse_gate import FuseGatePass
from .fuse_norm import FuseNormPass
from .fuse_residual import FuseResidualPass
from .graph_pass import Rewriting, log
from .linear_node import LinearNode, has_linear, without_autograd
from .merge_siblings import MergeSiblingsPass
from .report import PassReport, add_to_report
from .torch_versions import fake_tensor_updater

PASSES = (MergeSiblingsPass(), FuseNormPass(), FuseGatePass(), FuseResidualPass())


def rewrite(gm: fx.GraphModule) -> PassReport:
    """Run the passes on a post-grad graph, in place. A graph without HyperQuant layers is not touched."""
    report = PassReport()
    layer = next(LinearNode.all_of(gm.graph), None) if has_linear(gm.graph) else None
    if layer is None:
        return report
    # Inductor, which needs a second to import, is there when a graph is
    from torch._inductor.virtualized import V

    report.graphs = 1
    rewriting = Rewriting(gm.graph, current_config(), report)
    if _is_training(gm.graph):
        for graph_pass in PASSES:
            report.left[graph_pass.name, "a graph with gradients: run it under torch.no_grad()"] += 1
    else:
        log.debug("before:\n%s", gm.graph)
        updater, fake_mode = fake_tensor_updater(gm), layer.value("x").fake_mode
        for graph_pass in PASSES:
            graph_pass(rewriting)
        if report.made:
            # views of merged outputs have other strides than before
            with V.set_fake_mode(fake_mode):
                updater.incremental_update()
            gm.graph.lint()
        if without_autograd(gm.graph) or report.made:
            gm.recompile()
            log.debug("after:\n%s", gm.graph)
    add_to_report(report)
    return report


def _is_training(graph: fx.Graph) -> bool:
    """Whether a graph is the forward or backward half of a joint one. AOTAutograd names the inputs of those, and only those, so."""
    return any(node.name.startswith(("primals_", "tangents_")) for node in graph.find_nodes(op="placeholder"))


@functools.cache
def _source_hash() -> str:
    """Of all of the package, since kernels and fake kernels shape compiled code as much as the passes do."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def uuid() -> tuple:
    """Changes whenever what `rewrite` does to a graph may change."""
    return ("hq_inductor", _source_hash(), torch.__version__, astuple(current_config()))
