"""The one place that hands the passes to `torch.compile`.

How.    As Inductor's pass for the devices "cpu" and "cuda" (`custom_backend_passes`), which runs after its own post-grad patterns. What
        was installed there before runs first. Not as `torch._inductor.config.post_grad_custom_post_pass` and the like: a user's
        `options=` replaces those.
When.   The first HyperQuant layer or cache that is traced installs them, since the import of Inductor's code generators takes a second that
        nobody should pay who does not compile. The cache key of every graph compiled afterwards has `uuid()` in it.
        On CUDA, Inductor's workers then begin to import what they need to compile our kernels (`hq_inductor.ops.ahead`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._dynamo import register_backend
from torch._inductor.custom_graph_pass import CustomGraphModulePass
from torch.utils._python_dispatch import _disable_current_modes

from .ops.ahead import prepare_workers
from .ops.registry import on_first_trace
from .passes.compile_ahead import compile_ahead
from .passes.config import current_config
from .passes.direct_calls import enable_direct_calls
from .passes.pipeline import rewrite, uuid

DEVICES = ("cpu", "cuda")


class HyperQuantGraphPass(CustomGraphModulePass):
    """The passes behind those that another library installed for the same device."""

    def __init__(self, previous: CustomGraphModulePass | None):
        self.previous = previous

    def __call__(self, gm: torch.fx.GraphModule) -> None:
        if self.previous is not None:
            self.previous(gm)
        rewrite(gm)
        if current_config().compile_ahead:
            compile_ahead(gm.graph)

    def uuid(self):
        """None, which is no caching at all, if the pass before has none."""
        previous = None if self.previous is None else self.previous.uuid()
        if self.previous is not None and previous is None:
            return None
        return (uuid(), previous)


def _registry() -> dict[str, CustomGraphModulePass | None]:
    # may be imported while fake tensors are being made; no constant of Inductor's should become one
    with _disable_current_modes():
        from torch._inductor.codegen import common

        # at first use it sets all entries to what comes with torch
        common.init_backend_registration()
    return common.custom_backend_passes


def installed() -> bool:
    """Whether `torch.compile` runs the passes."""
    registry = _registry()
    return all(isinstance(registry.get(device), HyperQuantGraphPass) for device in DEVICES)


def install() -> None:
    """Have `torch.compile` run the passes. Nobody needs to call it, but after `uninstall`; a second call changes nothing."""
    registry = _registry()
    for device in DEVICES:
        current = registry.get(device)
        if not isinstance(current, HyperQuantGraphPass):
            registry[device] = HyperQuantGraphPass(current)
    enable_direct_calls(True)
    if torch.cuda.is_initialized() and current_config().compile_ahead:
        prepare_workers()


def uninstall() -> None:
    """Leave graphs compiled from now on alone. What was installed for a device before is as it was."""
    on_first_trace(None)
    enable_direct_calls(False)
    registry = _registry()
    for device in DEVICES:
        current = registry.get(device)
        if isinstance(current, HyperQuantGraphPass):
            registry[device] = current.previous


@contextlib.contextmanager
def _installed_meanwhile() -> Iterator[None]:
    before = installed()
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


@register_backend(name="hq_inductor")
def hq_inductor(gm: torch.fx.GraphModule, example_inputs: list, *, mode: str | None = None, options: dict | None = None):
    """Inductor with the passes, whether they are installed or not: `torch.compile(model, backend="hq_inductor")`.

    Args:
        mode, options: as of `torch.compile` with its own backend.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    with _installed_meanwhile():
        return compile_fx(gm, example_inputs, config_patches=patches or None)


on_first_trace(install)
