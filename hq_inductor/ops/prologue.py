"""What happens to activations before they are rotated: normalization or gating, in plain PyTorch, the specification.

Definition.  Of one row x of K features, h the same in fp32 (fp64 for fp64):
             `rms_norm`       `h / sqrt(mean(h^2) + eps) * weight`, rounded to the dtype of x            (`F.rms_norm`)
             `rms_norm_cast`  `round(h / sqrt(mean(h^2) + eps)) * weight`, rounded: before the gain too  (Hugging Face's LlamaRMSNorm)
             `layer_norm`     `(h - mean(h)) / sqrt(var(h) + eps) * weight + bias`, rounded              (`F.layer_norm`)
             `rms_norm_1p`, `layer_norm_1p`  `1 + weight` in place of the weight        (Gemma; modulation in diffusion transformers)
             `silu_mul`       `round(silu(gate)) * x`, rounded
             `gelu_mul`       `round(gelu(gate)) * x`, rounded; `gelu_tanh_mul` with tanh's approximation of it
             A missing weight is 1, a missing bias 0. Weight and bias of a norm may differ between rows, as in a modulation: they are
             `[*lead, 1, ..., K]` then, where lead are the first of the activations' leading dimensions.
Why.         Each is one more kernel before a quantized layer whose first kernel reads the same row anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LAYER_NORMS = ("layer_norm", "layer_norm_1p")
NORMS = ("rms_norm", "rms_norm_cast", "rms_norm_1p", *LAYER_NORMS)
GATES = ("silu_mul", "gelu_mul", "gelu_tanh_mul")
PROLOGUES = ("none", *NORMS, *GATES)


@dataclass(frozen=True, eq=False)
class Prologue:
    """What to do with activations first.

    Args:
        name: one of `PROLOGUES`.
        gate: of the shape and dtype of the activations, for `GATES`.
        weight: gain of a norm, `[K]` or one for some rows each (see above), or None.
        bias: the same of `LAYER_NORMS`, or None.
        eps: of a norm.
    """

    name: str = "none"
    gate: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 0.0

    def check(self, x: torch.Tensor) -> None:
        """`ValueError` or `TypeError` unless it fits activations `x`, `[..., K]`."""
        if self.name not in PROLOGUES:
            raise ValueError(f"prologue must be one of {', '.join(map(repr, PROLOGUES))}, got {self.name!r}")
        if (self.gate is not None) != (self.name in GATES):
            raise ValueError(f"gate must be given for {', '.join(GATES)} and for nothing else, got prologue {self.name!r}")
        if self.gate is not None and self.gate.shape != x.shape:
            raise ValueError(f"gate must have the shape of x, {tuple(x.shape)}, got {tuple(self.gate.shape)}")
        if self.gate is not None and self.gate.dtype != x.dtype:
            raise TypeError(f"gate must have the dtype of x, {x.dtype}, got {self.gate.dtype}")
        for name, tensor, users in (("norm_weight", self.weight, NORMS), ("norm_bias", self.bias, LAYER_NORMS)):
            if tensor is not None and self.name not in users:
                raise ValueError(f"{name} must be None unless prologue is {' or '.join(users)}, got prologue {self.name!r}")
            if tensor is not None and tensor.shape != x.shape[-1:] and not _is_for_rows(tensor, x):
                raise ValueError(
                    f"{name} must have shape ({x.shape[-1]},), or the first of the dimensions {tuple(x.shape[:-1])} and ones for the rest "
                    f"before it, got {tuple(tensor.shape)}"
                )
        if self.weight is not None and self.bias is not None and self.weight.shape != self.bias.shape:
            raise ValueError(f"norm_bias must have the shape of norm_weight, {tuple(self.weight.shape)}, got {tuple(self.bias.shape)}")

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Activations `[..., K]` after it, in the dtype of `x`."""
        if self.name == "none":
            return x
        if self.name in GATES:
            if self.name == "silu_mul":
                return F.silu(self.gate) * x
            return F.gelu(self.gate, approximate="tanh" if self.name == "gelu_tanh_mul" else "none") * x
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.name in LAYER_NORMS:
            h = h - h.mean(-1, keepdim=True)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        if self.name == "rms_norm_cast":
            h = h.to(x.dtype).to(h.dtype)
        if self.weight is not None:
            h = h * (self.weight.to(h.dtype) + 1 if self.name.endswith("_1p") else self.weight)
        if self.bias is not None:
            h = h + self.bias
        return h.to(x.dtype)


def _is_for_rows(tensor: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a tensor is `[*x.shape[:n], 1, ..., K]` for some n."""
    if tensor.dim() != x.dim() or tensor.shape[-1] != x.shape[-1]:
        return False
    leading = range(x.dim() - 1)
    first = next((d for d in leading if tensor.shape[d] != x.shape[d]), len(leading))
    return all(size == 1 for size in tensor.shape[first:-1])


NO_PROLOGUE = Prologue()
