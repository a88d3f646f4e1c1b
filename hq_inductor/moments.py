"""Second moments of layers' inputs, for error feedback (`hq_inductor.format.feedback`).

    measure_moments(model, batches)
    quantize_(model, hyperquant_weight(bps=3))      # uses and forgets them

Definition.  `[K, K]` fp32, the sum of `x x^T` over the rows of all inputs of a layer; any multiple of it serves as well.
Memory.      4 K^2 bytes for each activation that linears read, shared by linears that read the same: 64 MiB for 4096 features, 784 MiB for
             14336. For large models measure and quantize a part at a time, with `filter_fn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from .balance import Batch, run_model


@torch.no_grad()
def measure_moments(
    model: nn.Module, batches: Iterable[Batch], filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> dict[str, torch.Tensor]:
    """Measure what linear layers read, and leave it in their buffer `input_moments` for `quantize_` to round with feedback.

    Call it after `balance_columns`, which changes what layers read, and before `quantize_`.

    Args:
        model: in evaluation mode, not yet quantized.
        batches: inputs (tensor, tuple or dict of keyword arguments), without padding. More rows than a layer has columns, better
            several times as many: what few rows do not show is rounded as if it never happened.
        filter_fn: `(module, name) -> bool`, which layers; None takes every `nn.Linear`.

    Returns:
        The buffers by layer. Layers that were not run are missing.

    Raises:
        ValueError: there are no batches, or none of the layers was run.
    """
    modules = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and (filter_fn is None or filter_fn(m, n))}
    batches = list(batches)
    if not batches:
        raise ValueError("batches must hold at least one input, got none")
    found: dict[str, torch.Tensor] = {}
    last: list[tuple[torch.Tensor, str]] = []
    leader: dict[str, str] = {}

    def observe(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            # `last` keeps the tensor alive, so that equal addresses mean equal activations
            same = last and last[0][0].data_ptr() == x.data_ptr() and last[0][0].shape == x.shape
            if name not in leader:
                leader[name] = leader[last[0][1]] if same else name
            elif leader[name] != name and not (same and leader[last[0][1]] == leader[name]):
                raise RuntimeError(f"{name} and {leader[name]} must read the same activation in every batch")
            last[:] = [(x, name)]
            if leader[name] == name:
                flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
                found[name] = torch.addmm(found[name], flat.t(), flat) if name in found else flat.t() @ flat

        return hook

    handles = [module.register_forward_pre_hook(observe(name)) for name, module in modules.items()]
    try:
        for batch in batches:
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(f"none of the {len(modules)} linear layers was run on the batches")
    for name, first in leader.items():
        modules[name].register_buffer("input_moments", found[first], persistent=False)
    return {name: found[first] for name, first in leader.items()}
