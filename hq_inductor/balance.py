"""Column balancing: moving quantization noise away from the input channels where it would hurt, before the rotation.

Definition.  The noise of a rotated, quantized weight is white over the columns of a tile, however large their activations are. With columns
             multiplied by `d_i` and activations by `1 / d_i` the layer is the same, and the expected output error of a tile is proportional
             to `sum(rms_w_i^2 d_i^2) * sum(rms_x_i^2 / d_i^2)`, least at `d_i = sqrt(rms_x_i / rms_w_i)` (Cauchy-Schwarz). Linears that
             read the same activation share `d`; `rms_w` then runs over all their rows.
Storage.     `1 / d` goes into the gain of the norm before the layers, or into the rows of the linear before (values into the output
             projection, `up_proj` into `down_proj`), where that leaves the model's function as it is: tried on a batch, undone where it
             does not. Then nothing is stored and the rate stays exactly `bps`. Elsewhere it becomes `act_pre_scale`, 16 bits per column.
Robustness.  Columns or activations below a thousandth of the tensor's own rms count as that much, and `d` stays within a factor of 16 of
             its geometric mean: a dead column would otherwise drown the others' range in rounding.
Source.      Own derivation; SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978) scale columns for range and salience instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

_FLOOR = 1e-3
_MAX_LOG2 = 4.0
# tensors kept alive to recognise a linear's input by; enough for the norms of queries and keys to come in between
_RECENT = 8

Batch = torch.Tensor | Mapping[str, torch.Tensor] | tuple


def column_scale(weight: torch.Tensor, rms_x: torch.Tensor | None = None) -> torch.Tensor:
    """`act_pre_scale` of a weight, `1 / d` relative to its geometric mean.

    Args:
        weight: `[N, K]`; several linears with one input are stacked.
        rms_x: `[K]`, root mean square of the activations; None means that all are alike.

    Returns:
        `[K]` bf16, from 1/16 to 16.
    """
    log = _log2(weight.detach().to(torch.float32).square().mean(0).sqrt())
    if rms_x is not None:
        log = log - _log2(rms_x.to(torch.float32))
    log = log / 2
    return torch.exp2((log - log.mean()).clamp(-_MAX_LOG2, _MAX_LOG2)).to(torch.bfloat16)


def _log2(rms: torch.Tensor) -> torch.Tensor:
    floor = (_FLOOR * rms.square().mean().sqrt()).clamp(min=1e-30)
    return torch.log2(torch.maximum(rms, floor))


@dataclass(frozen=True)
class BalancedGroup:
    """Linears that read one activation, and where their `1 / d` went.

    Attributes:
        linears: names of the layers.
        folded_into: name of the norm or linear before them, or None if each layer keeps an `act_pre_scale`.
        gain: expected reduction of the group's output error, in dB, for white quantization noise.
    """

    linears: tuple[str, ...]
    folded_into: str | None
    gain: float


class _Observer:
    """Forward hooks: the mean square of every linear's input, which linears read the same tensor, and which norm wrote it."""

    def __init__(self, model: nn.Module, names: list[str]):
        self.squares: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        self.leader: dict[str, str] = {}
        self.norm: dict[str, str | None] = {}
        self._inputs: list[tuple[torch.Tensor, str]] = []
        self._outputs: list[tuple[torch.Tensor, str]] = []
        self._handles = []
        for name, module in model.named_modules():
            if name in names:
                self._handles.append(module.register_forward_pre_hook(self._linear_hook(name)))
            elif "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None and module.weight.dim() == 1:
                self._handles.append(module.register_forward_hook(self._norm_hook(name)))

    @staticmethod
    def _find(recent: list[tuple[torch.Tensor, str]], x: torch.Tensor) -> str | None:
        # dropout in eval mode and views give new objects for the same memory; `recent` keeps it from being reused
        for other, name in reversed(recent):
            if other.data_ptr() == x.data_ptr() and other.numel() == x.numel():
                return name
        return None

    def _linear_hook(self, name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            leader = self._find(self._inputs, x)
            if name not in self.leader:
                self.leader[name] = leader or name
                self.norm[name] = self._find(self._outputs, x)
            self._inputs = [*self._inputs, (x, leader or name)][-_RECENT:]
            if self.leader[name] == name:
                flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
                self.squares[name] = self.squares.get(name, 0) + flat.square().sum(0)
                self.rows[name] = self.rows.get(name, 0) + flat.shape[0]

        return hook

    def _norm_hook(self, name: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            self._outputs = [*self._outputs, (output.detach(), name)][-_RECENT:]

        return hook

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._inputs, self._outputs = [], []

    def groups(self) -> dict[str, list[str]]:
        """Linears by the first one that read the same tensor."""
        found: dict[str, list[str]] = {}
        for name, leader in self.leader.items():
            found.setdefault(leader, []).append(name)
        return found

    def rms(self, leader: str) -> torch.Tensor:
        return (self.squares[leader] / self.rows[leader]).sqrt()


def run_model(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, bool]:
    """Run the model on a batch; its `logits` and True, or its first floating-point tensor and False."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, tuple):
        output = model(*batch)
    else:
        output = model(batch)
    if isinstance(output, torch.Tensor):
        return output, False
    if isinstance(output, Mapping) and isinstance(output.get("logits"), torch.Tensor):
        return output["logits"], True
    values = output.values() if isinstance(output, Mapping) else output
    return next(v for v in values if isinstance(v, torch.Tensor) and v.dtype.is_floating_point), False


# (writer, reader) among the children of one module: rows of the first reach the columns of the second through products and averages only
_ROWS_TO_COLUMNS = (("up_proj", "down_proj"), ("v_proj", "o_proj"))


@dataclass
class _Fold:
    """A change that leaves the model's function as it is: `scale` into what writes the activation, its inverse into what reads it."""

    writer: str
    linears: tuple[str, ...]
    scale: torch.Tensor  # [K], 1 / d
    repeat: int = 1  # readers' columns per writer's row: queries' heads that share one head of values
    head: int = 1

    def writer_scale(self) -> torch.Tensor:
        if self.repeat == 1:
            return self.scale
        return self.scale.reshape(-1, self.repeat, self.head)[:, 0].reshape(-1)

    def tensors(self, model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Parameters and what to multiply them by."""
        module, scale = model.get_submodule(self.writer), self.writer_scale()
        found = [(module.weight, scale[:, None] if module.weight.dim() == 2 else scale)]
        if getattr(module, "bias", None) is not None:
            found.append((module.bias, scale))
        return found + [(model.get_submodule(name).weight, 1 / self.scale) for name in self.linears]

    def apply(self, model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Fold; returns parameters and copies of what they were."""
        saved = []
        for parameter, factor in self.tensors(model):
            saved.append((parameter, parameter.detach().clone()))
            parameter.data = (parameter.detach().to(torch.float32) * factor).to(parameter.dtype)
        return saved


def _writer(model: nn.Module, linears: list[str], norm: str | None) -> tuple[str | None, int, int]:
    """What a group's scale may be folded into, and the reader's columns per row of it with the length of a head."""
    if norm is not None:
        return norm, 1, 1
    parent, _, last = linears[0].rpartition(".")
    for writer, reader in _ROWS_TO_COLUMNS:
        if len(linears) == 1 and last == reader and isinstance(getattr(model.get_submodule(parent), writer, None), nn.Linear):
            name = f"{parent}.{writer}" if parent else writer
            rows, columns = model.get_submodule(name).out_features, model.get_submodule(linears[0]).in_features
            head = getattr(model.get_submodule(parent), "head_dim", rows)
            if columns % rows == 0 and rows % head == 0:
                return name, columns // rows, head
    return None, 1, 1


def _expected_gain(weight: torch.Tensor, rms_x: torch.Tensor, scale: torch.Tensor) -> float:
    """Output error without scales over that with them, dB."""
    w, x, s = (t.to(torch.float64).square() for t in (weight.detach().to(torch.float32).square().mean(0).sqrt(), rms_x, scale))
    return 10 * torch.log10(w.sum() * x.sum() / ((w / s).sum() * (x * s).sum())).item()


@torch.no_grad()
def balance_columns(
    model: nn.Module,
    batches: Iterable[Batch],
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    store_scales: bool = True,
) -> list[BalancedGroup]:
    """Balance the columns of a model's linear layers for quantization, in place. Call it before `quantize_`.

    Scales are folded into the norm or linear before a layer where that leaves the model's function unchanged, which is tried on the first
    batch. Other layers remember theirs, and `quantize_(model, hyperquant_weight(...))` stores it as the weight's `act_pre_scale`.

    Args:
        model: in evaluation mode, not yet quantized.
        batches: a few inputs (tensor, tuple or dict of keyword arguments), without padding. Text that the model
            itself generates serves as well as real text. Measured on a 24M model: 4096 tokens suffice, 512 do more harm than good.
        filter_fn: `(module, name) -> bool`, which layers to balance; None takes every `nn.Linear`.
        store_scales: False leaves layers alone whose scales cannot be folded, so that rates stay exactly `bps`.

    Returns:
        What was done, group by group, in the order of execution.

    Raises:
        ValueError: there are no batches, or none of the layers was run.
    """
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and (filter_fn is None or filter_fn(m, n))]
    batches = list(batches)
    if not batches:
        raise ValueError("batches must hold at least one input, got none")
    observer = _Observer(model, names)
    try:
        for index, batch in enumerate(batches):
            output, _ = run_model(model, batch)
            if index == 0:
                expected = output
    finally:
        observer.close()
    if not observer.leader:
        raise ValueError(f"none of the {len(names)} linear layers was run on the batches")

    # all scales come from the unfolded weights: scaling a row changes neither its own noise-to-signal ratio nor its weight in the output
    folds: dict[tuple, list[_Fold]] = {}
    scales, gains = {}, {}
    for leader, linears in observer.groups().items():
        weight = torch.cat([model.get_submodule(name).weight.detach() for name in linears])
        rms_x = observer.rms(leader).to(weight.device)
        writer, repeat, head = _writer(model, linears, observer.norm[leader])
        scale = column_scale(*_averaged(weight, rms_x, repeat, head)).to(torch.float32)
        scales[leader], gains[leader] = scale, _expected_gain(weight, rms_x, scale)
        if writer is not None:
            kind = (type(model.get_submodule(writer)).__name__, tuple(name.rpartition(".")[2] for name in linears))
            folds.setdefault(kind, []).append(_Fold(writer, tuple(linears), scale, repeat, head))

    folded_into = {}
    for members in folds.values():
        saved = [pair for fold in members for pair in fold.apply(model)]
        if _same(expected, run_model(model, batches[0])[0]):
            folded_into.update({fold.linears: fold.writer for fold in members})
        else:
            # last change first: one norm may be in the list twice
            for parameter, before in reversed(saved):
                parameter.data = before

    report = []
    for leader, linears in observer.groups().items():
        target = folded_into.get(tuple(linears))
        if target is None and not store_scales:
            continue
        if target is None:
            for name in linears:
                model.get_submodule(name).register_buffer("balance_scale", scales[leader], persistent=False)
        report.append(BalancedGroup(tuple(linears), target, gains[leader]))
    return report


def _averaged(weight: torch.Tensor, rms_x: torch.Tensor, repeat: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack the columns that must share a scale, `[N, K]` to `[N * repeat, K]` with every repeat alike, and average their activations."""
    if repeat == 1:
        return weight, rms_x
    shape = (-1, repeat, head)
    squares = weight.to(torch.float32).square().mean(0).reshape(shape).mean(1, keepdim=True)
    mean_x = rms_x.square().reshape(shape).mean(1, keepdim=True)
    rms_w, rms = (t.expand(-1, repeat, -1).reshape(-1).sqrt() for t in (squares, mean_x))
    return rms_w[None], rms


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs agree up to the rounding of their dtype in a deep model."""
    tolerance = 1e-3 if torch.finfo(a.dtype).eps < 1e-4 else 5e-2
    a, b = a.to(torch.float32), b.to(torch.float32)
    return bool((a - b).norm() <= tolerance * a.norm())
