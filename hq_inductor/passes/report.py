"""What the passes did since the process began, or since `reset_report`. A graph that comes from Inductor's cache runs no pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class PassReport:
    """Rewrites that were made, and opportunities that were not taken.

    Attributes:
        graphs: graphs with HyperQuant layers that were seen.
        made: how often each rewrite was made, by name.
        left: how often each rewrite was not made, by name and reason.
    """

    graphs: int = 0
    made: Counter[str] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"graphs with HyperQuant layers: {self.graphs}"]
        lines += [f"{name}: {count}" for name, count in sorted(self.made.items())]
        lines += [f"{name} left out, {reason}: {count}" for (name, reason), count in sorted(self.left.items())]
        return "\n".join(lines)


_report = PassReport()


def report() -> PassReport:
    """A copy of the counts so far."""
    return PassReport(_report.graphs, _report.made.copy(), _report.left.copy())


def reset_report() -> None:
    """Count from zero again."""
    _report.graphs = 0
    _report.made.clear()
    _report.left.clear()


def add_to_report(graph_report: PassReport) -> None:
    _report.graphs += graph_report.graphs
    _report.made.update(graph_report.made)
    _report.left.update(graph_report.left)
