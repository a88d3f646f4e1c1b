"""What a rewrite is: a name, which is also its switch, and a function that rewrites a graph.

Invariants.  The graph is functional and stays so; outputs alias nothing that they did not; every new node has its fake tensor in
             `meta["val"]`; a second run finds nothing to do. A pass keeps no state: what it made and left goes to the report.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import fx

from .config import PassConfig
from .linear_node import LinearNode
from .policy import why_not
from .report import PassReport

# TORCH_LOGS="+hq_inductor.passes" shows it
log = logging.getLogger("hq_inductor.passes")


@dataclass(frozen=True)
class Rewriting:
    """One graph on its way through the passes."""

    graph: fx.Graph
    config: PassConfig
    report: PassReport

    def pays(self, name: str, linear: LinearNode) -> bool:
        """Whether to rewrite around a layer; if not, it is reported."""
        reason = why_not(name, linear, self.config)
        if reason is not None:
            self.leave(name, linear.node, reason)
        return reason is None

    def made(self, name: str, node: fx.Node) -> None:
        self.report.made[name] += 1
        log.info("%s made %s", name, node)

    def leave(self, name: str, node: fx.Node, reason: str) -> None:
        self.report.left[name, reason] += 1
        log.info("%s left out at %s: %s", name, node, reason)


class GraphPass(ABC):
    """One rewrite of quantized layers and what surrounds them."""

    name: str

    @abstractmethod
    def __call__(self, rewriting: Rewriting) -> None:
        """Rewrite `rewriting.graph` in place."""
