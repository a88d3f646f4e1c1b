"""Mixed rates: bits go to the layers whose error the model's output feels most, at a byte budget that is met exactly or just missed.

Definition.  The expected damage is taken as a sum over layers, `sum_l s_l D(r_l)`: D the relative squared error of a lattice at a rate
             (from the rate table), `s_l` the layer's sensitivity. From the lowest rates on, the step that lowers the sum most per byte is
             taken, until none fits.
             `s_l` comes from the second-order expansion of the KL divergence for white noise: half the trace of the Fisher information of
             the layer's weights, weighted by the rows' mean squares. `E |d log p(y) / d W|^2` over outputs y drawn from the model itself
             is that trace, so a few backward passes serve all layers. Models without logits: squared output error.
Limits.      The expansion holds for small noise. Measured on a 24M language model, layer by layer: right within a factor of 2 at 4 bps, but
             up to 14 times too low for early layers at 2 bps. Hence rates stay near the average by default. Equal sensitivities, which need
             no data, did worse than one rate for all on that model, so there is no such mode.
Source.      Linearity of the damage in the layers' relative errors: HIGGS, arXiv 2411.17525. Fisher trace as sensitivity: HAWQ-V2,
             arXiv 1911.03852, and SqueezeLLM, arXiv 2306.07629. Rate allocation by equal slopes: Shoham and Gersho, 1988.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import FqnToConfig

from .balance import Batch, run_model
from .format.rate_table import RATE_TABLE
from .format.rates import MAX_BPS, MIN_BPS, check_rate, weight_layout
from .quantize import HyperQuantWeightConfig, why_left_alone


def relative_error(bps: float, lattice: str = "e8") -> float:
    """Squared error over signal at a rate, on Gaussian coefficients, from the rate table."""
    check_rate(bps, lattice)
    return 10 ** (-RATE_TABLE[lattice][int(8 * bps)].snr_db / 10)


def _noise_profile(module: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance of the quantization error of `weight[n, k]` over D: a factor `[N, 1]` by row and one `[1, K]` by column."""
    scale = getattr(module, "balance_scale", None)
    weight = module.weight.detach().to(torch.float32)
    if scale is None:
        return weight.square().mean(1, keepdim=True), torch.ones_like(weight[:1])
    return (weight / scale).square().mean(1, keepdim=True), scale.to(torch.float32).square()[None]


def measure_sensitivity(
    model: nn.Module, batches: Iterable[Batch], names: Iterable[str], draws: int = 4, seed: int = 0
) -> dict[str, float]:
    """How much of the model's output each layer's relative error costs.

    Args:
        model: not yet quantized. Weights need no gradient beforehand and have none afterwards.
        batches: inputs (tensor, tuple or dict of keyword arguments), without padding.
        names: linear layers.
        draws: backward passes per batch, each with its own random outputs.
        seed: of those outputs.

    Returns:
        By layer, the KL divergence in nats per token (models with `logits`), or the squared error of the first output per element, that a
        relative squared error of 1 in the weight would cause if the expansion held that far.

    Raises:
        ValueError: there are no batches.
    """
    names, batches = list(names), list(batches)
    if not batches:
        raise ValueError("batches must hold at least one input, got none")
    total, count = dict.fromkeys(names, 0.0), 0
    weights = {name: model.get_submodule(name).weight for name in names}
    profiles = {name: _noise_profile(model.get_submodule(name)) for name in names}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = []

    def collect(name: str):
        def hook(parameter: torch.Tensor) -> None:
            rows, columns = profiles[name]
            total[name] += (parameter.grad.to(torch.float32).square() * rows * columns).sum().item()
            parameter.grad = None

        return hook

    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for name, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(collect(name)))
        for batch in batches:
            for _ in range(draws):
                generator = torch.Generator().manual_seed(seed)
                seed += 1
                with torch.enable_grad():
                    output, is_logits = run_model(model, batch)
                    if is_logits:
                        flat = output.flatten(0, -2).to(torch.float32)
                        # on the CPU: the same draw on every device
                        drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
                        F.cross_entropy(flat, drawn.to(flat.device), reduction="sum").backward()
                        count += flat.shape[0]
                    else:
                        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device, output.dtype) * 2 - 1
                        (output * signs).sum().backward()
                        count += output.numel()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return {name: (0.5 if is_logits else 1.0) * value / count for name, value in total.items()}


def _choices(module: nn.Linear, lattice: str, low: float, high: float) -> list[tuple[float, int]]:
    """(rate, bytes) of a layer, ascending; of rates that take the same words, the lowest."""
    rows, columns = module.weight.shape
    found: dict[int, float] = {}
    for eighths in range(math.ceil(8 * low), math.floor(8 * high) + 1):
        try:
            layout = weight_layout(columns, eighths / 8, lattice)
        except ValueError:
            # the lowest rates do not hold a short tile whose words are rounded down
            continue
        found.setdefault(4 * rows * layout.tiles * layout.tile.words, eighths / 8)
    return [(bps, size) for size, bps in sorted(found.items())]


def allocate_rates(
    model: nn.Module,
    bps: float,
    batches: Iterable[Batch],
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    lattice: str = "e8",
    min_bps: float | None = None,
    max_bps: float | None = None,
    **config,
) -> FqnToConfig:
    """A rate for every linear layer, at an average rate: `quantize_(model, allocate_rates(model, 3.5, batches), filter_fn=None)`.

    Args:
        model: not yet quantized; after `balance_columns`, if that is used.
        bps: average bits per weight of the layers in the result, everything included; any number within the lattice's rates.
        batches: a few inputs (tensor, tuple or dict of keyword arguments), without padding, to measure sensitivities on.
        filter_fn: `(module, name) -> bool`, which layers to quantize; None takes every `nn.Linear`.
        lattice, config: as in `hyperquant_weight`.
        min_bps, max_bps: limits of a layer's rate; None is 3/8 below the average and 1 above.

    Returns:
        An `FqnToConfig` from layer names to `HyperQuantWeightConfig`s, to read, edit and pass to `quantize_` with `filter_fn=None`.
        Together they take at most `bps` bits per weight, and less than one step of one layer below.

    Raises:
        ValueError: no layer is left, or `bps` lies below what the lowest rates take.
    """
    check_rate(math.floor(8 * bps) / 8, lattice)
    low = max(MIN_BPS[lattice], math.floor(8 * bps - 3) / 8) if min_bps is None else min_bps
    high = min(MAX_BPS, math.ceil(8 * bps + 8) / 8) if max_bps is None else max_bps
    for rate in (low, high):
        check_rate(rate, lattice)
    modules, fixed = {}, 0
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or (filter_fn is not None and not filter_fn(module, name)):
            continue
        if why_left_alone(module.in_features, HyperQuantWeightConfig(low, lattice, **config)) is None:
            modules[name] = module
            stored = "balance_scale" in module._buffers or config.get("balance_columns", False)
            fixed += 2 * module.in_features if stored else 0
    if not modules:
        raise ValueError("model must have a linear layer to allocate a rate to, got none")
    weights = sum(module.weight.numel() for module in modules.values())
    sensitivity = measure_sensitivity(model, batches, modules)

    choices = {name: _choices(module, lattice, low, high) for name, module in modules.items()}
    left = math.floor(bps * weights / 8) - fixed - sum(options[0][1] for options in choices.values())
    if left < 0:
        raise ValueError(f"bps must be at least {bps - 8 * left / weights:.4f} for these layers and min_bps={low}, got {bps}")
    level = dict.fromkeys(modules, 0)
    heap: list[tuple[float, str, int]] = []

    def offer(name: str) -> None:
        """Queue the layer's best step: the table's error is not quite convex, so it may skip a rate."""
        now, size = choices[name][level[name]]
        best = (0.0, 0)
        for index in range(level[name] + 1, len(choices[name])):
            after, larger = choices[name][index]
            if larger - size <= left:
                gain = sensitivity[name] * (relative_error(now, lattice) - relative_error(after, lattice))
                best = max(best, (gain / (larger - size), index))
        if best[0] > 0:
            heapq.heappush(heap, (-best[0], name, best[1]))

    for name in modules:
        offer(name)
    while heap:
        _, name, index = heapq.heappop(heap)
        step = choices[name][index][1] - choices[name][level[name]][1]
        if step <= left:
            left -= step
            level[name] = index
        # what did not fit any more may have a smaller step that does
        offer(name)
    return FqnToConfig({name: HyperQuantWeightConfig(choices[name][level[name]][0], lattice, **config) for name in modules})
