"""`quantization_report`: what every weight matrix of a model is stored as, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .module import HyperQuantLinear
from .tensor import HyperQuantTensor


@dataclass(frozen=True)
class WeightReport:
    """One matrix: its name, logical shape, bytes stored, and whether and how it is quantized."""

    name: str
    shape: tuple[int, ...]
    size_bytes: int
    form: str
    quantized: bool

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / math.prod(self.shape)


@dataclass(frozen=True)
class QuantizationReport:
    """All weight matrices of a model's linear layers. `str()` gives a table."""

    weights: tuple[WeightReport, ...]

    @property
    def quantized(self) -> tuple[WeightReport, ...]:
        return tuple(w for w in self.weights if w.quantized)

    @property
    def size_bytes(self) -> int:
        """Bytes of the quantized matrices."""
        return sum(w.size_bytes for w in self.quantized)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over the quantized matrices, everything included."""
        numel = sum(math.prod(w.shape) for w in self.quantized)
        return 8 * self.size_bytes / numel if numel else float("nan")

    def __str__(self) -> str:
        width = max((len(w.name) for w in self.weights), default=4)
        lines = [f"{'name':{width}}  {'shape':>14}  {'bytes':>12}  {'bits/weight':>11}  stored as"]
        lines += [
            f"{w.name:{width}}  {'x'.join(map(str, w.shape)):>14}  {w.size_bytes:>12,}  {w.bits_per_weight:>11.4f}  {w.form}"
            for w in self.weights
        ]
        lines.append(
            f"{len(self.quantized)} of {len(self.weights)} quantized, {self.size_bytes:,} bytes, {self.bits_per_weight:.4f} bits/weight"
        )
        return "\n".join(lines)


def _stored_as(weight: HyperQuantTensor) -> str:
    if weight.packing == "rice":
        return ""
    return ", as e4m3" if weight.qdata.dtype == torch.uint8 else ", as int8 codes"


def quantization_report(model: nn.Module) -> QuantizationReport:
    """Report every matrix of the linear layers in a model, quantized or not, and every other quantized parameter."""
    weights = []
    for name, module in model.named_modules():
        found = dict(module.named_parameters(recurse=False))
        if isinstance(module, HyperQuantLinear):
            found = {"weight": module.weight}
        for key, weight in found.items():
            full = f"{name}.{key}" if name else key
            if isinstance(weight, HyperQuantTensor):
                form = f"{weight.lattice} at {weight.bps:g} bps, tile {weight.tile}" + _stored_as(weight)
                weights.append(WeightReport(full, tuple(weight.shape), weight.size_bytes, form, True))
            elif isinstance(module, nn.Linear) and key == "weight" and weight.dim() == 2:
                size = weight.numel() * weight.element_size()
                weights.append(WeightReport(full, tuple(weight.shape), size, str(weight.dtype), False))
    return QuantizationReport(tuple(weights))
