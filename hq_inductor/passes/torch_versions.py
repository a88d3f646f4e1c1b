"""What differs between the versions of torch that the passes run on."""

from __future__ import annotations

import inspect

from torch import fx


def fake_tensor_updater(gm: fx.GraphModule):
    """Inductor's updater of `meta["val"]`, made before a graph changes; `incremental_update()` after. Takes the graph or, later, the module."""
    from torch._inductor.fx_utils import FakeTensorUpdater

    parameters = list(inspect.signature(FakeTensorUpdater).parameters)
    return FakeTensorUpdater(gm.graph if parameters == ["graph"] else gm)
