"""Graph passes: what `torch.compile` does to a graph with HyperQuant layers before it generates code.

`install` and `uninstall` are in `hq_inductor.compile`, which calls the passes; the first traced layer installs them.
"""

from .config import PassConfig, configure, configured, current_config
from .report import PassReport, report, reset_report

__all__ = ["PassConfig", "PassReport", "configure", "configured", "current_config", "report", "reset_report"]
