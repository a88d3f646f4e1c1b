"""What differs between the versions of torch that the passes run on."""

from __future__ import annotations

import inspect

from torch import fx


def fake_tensor_updater(gm: fx.GraphModule):
    """Inductor's updater of `meta["val"]`, made before a graph changes; `incremental_update()` after.

    Takes the graph up to torch 2.11, the module later.
    """
    # torch 2.11 uses the former in the latter without importing it
    import torch._inductor.fx_passes.reinplace  # noqa: F401
    from torch._inductor.fx_utils import FakeTensorUpdater

    parameters = list(inspect.signature(FakeTensorUpdater).parameters)
    return FakeTensorUpdater(gm.graph if parameters == ["graph"] else gm)
