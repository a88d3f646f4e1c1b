"""`HyperQuantLinear`: a linear layer that holds plain tensors and shows a `HyperQuantTensor` as its weight.

Why.  A subclass parameter costs a compiled step 4 to 27 us each (guards and unwrapping, torch 2.11, H200), more than the matmul itself.
      Here the compiled graph takes `qdata` as an ordinary parameter, while `.weight`, state dicts and torchao see the subclass.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .ops.linear import call_linear
from .tensor import HyperQuantTensor, check_layout

_PARTS = ("qdata", "act_pre_scale", "codes_scale")


class HyperQuantLinear(nn.Linear):
    """A linear layer with an entropy-coded, frozen weight. Made by `quantize_(model, hyperquant_weight(...))` or `from_linear`.

    Attributes:
        qdata: `[out_features, tiles, words]` int32 parameter without gradient.
        act_pre_scale: `[in_features]` parameter without gradient, or None.
        codes_scale: int32 parameter without gradient of `packing="codes"` (then `qdata` is `[out_features, tiles, tile]`), or None.
        bias: as in `nn.Linear`.
        weight: the same data as a `HyperQuantTensor`; assigning one replaces the data.
    """

    qdata: nn.Parameter
    act_pre_scale: nn.Parameter | None
    codes_scale: nn.Parameter | None

    def __init__(self, *args, **kwargs):
        raise TypeError("make a HyperQuantLinear with HyperQuantLinear.from_linear(linear, weight)")

    @classmethod
    def from_linear(cls, linear: nn.Linear, weight: HyperQuantTensor) -> HyperQuantLinear:
        """Turn a linear layer into a quantized one, in place: hooks, bias, training mode and attributes stay.

        Raises:
            TypeError: `linear` is not exactly an `nn.Linear`. ValueError: `weight` has another shape.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear must be exactly a torch.nn.Linear, got {type(linear).__name__}")
        if tuple(weight.shape) != (linear.out_features, linear.in_features):
            raise ValueError(f"weight must have shape {(linear.out_features, linear.in_features)}, got {tuple(weight.shape)}")
        # a parameter, or a plain attribute where a library has put the weight back after deleting the parameter
        linear._parameters.pop("weight", None)
        linear.__dict__.pop("weight", None)
        linear.__class__ = cls
        linear._set_weight(weight)
        return linear

    def _set_weight(self, weight: HyperQuantTensor) -> None:
        check_layout(weight)
        for name in _PARTS:
            tensor = getattr(weight, name)
            self._parameters[name] = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
        self.weight_dtype = weight.dtype
        self.bps, self.lattice, self.tile = weight.bps, weight.lattice, weight.tile
        self.code, self.seed, self.format_version, self.mma = weight.code, weight.seed, weight.format_version, weight.mma

    @property
    def weight(self) -> HyperQuantTensor:
        face = self._face(self.qdata, self.act_pre_scale, self.codes_scale)
        # a parameter, as of any linear layer: vLLM and peft register it elsewhere; shares the memory of `qdata`
        return face if torch.compiler.is_compiling() else nn.Parameter(face, requires_grad=False)

    def _face(self, qdata: torch.Tensor, act_pre_scale: torch.Tensor | None, scale: torch.Tensor | None) -> HyperQuantTensor:
        return HyperQuantTensor(
            qdata,
            (self.out_features, self.in_features),
            self.bps,
            self.lattice,
            self.tile,
            self.code,
            self.seed,
            self.weight_dtype,
            format_version=self.format_version,
            mma=self.mma,
            act_pre_scale=act_pre_scale,
            codes_scale=scale,
        )

    def __setattr__(self, name: str, value) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif isinstance(value, HyperQuantTensor):
            if tuple(value.shape) != (self.out_features, self.in_features):
                raise ValueError(f"weight must have shape {(self.out_features, self.in_features)}, got {tuple(value.shape)}")
            self._set_weight(value)
        elif isinstance(value, DTensor) and isinstance(value.to_local(), HyperQuantTensor):
            self.__delattr__("weight")
            self.register_parameter("weight", value)
        else:
            raise TypeError(f"weight of a HyperQuantLinear must be a HyperQuantTensor, got {type(value).__name__}")

    def __delattr__(self, name: str) -> None:
        """Deleting the weight leaves an ordinary linear layer without one, as peft and torchao expect before they assign another."""
        if name != "weight":
            return super().__delattr__(name)
        for key in _PARTS:
            del self._parameters[key]
        self.__class__ = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.codes_scale is not None:
            return torch.ops.hyperquant.codes_linear(
                input, self.qdata, self.codes_scale, self.act_pre_scale, self.bias, self.lattice, self.seed, self.mma
            )
        return call_linear(input, self.qdata, self.act_pre_scale, self.bias, self.lattice, self.tile, self.code, self.seed, self.mma)

    def _apply(self, fn, recurse: bool = True):
        # words have no floating dtype, but `model.half()` is expected to change what `weight.dtype` says
        converted = fn(torch.empty(0, dtype=self.weight_dtype, device=self.qdata.device)).dtype
        super()._apply(fn, recurse)
        self.weight_dtype = converted
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._face(*(destination.pop(prefix + name, None) for name in _PARTS))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        state_dict, key = dict(state_dict), prefix + "weight"
        weight = state_dict.pop(key, None)
        missing: list[str] = []
        if isinstance(weight, HyperQuantTensor):
            assign = local_metadata.get("assign_to_params_buffers", False)
            problem = self._incompatibility(weight, assign)
            if problem:
                error_msgs.append(f"{key}: {problem}")
                weight = self.weight
            elif assign:
                self._set_weight(weight)
            for name in _PARTS:
                if getattr(weight, name) is not None:
                    state_dict[prefix + name] = getattr(weight, name)
        elif weight is not None:
            error_msgs.append(f"{key}: expected a HyperQuantTensor, got {type(weight).__name__}; load it before quantize_")
            state_dict[prefix + "qdata"] = self.qdata
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(key if name == prefix + "qdata" else name for name in missing)

    def _incompatibility(self, weight: HyperQuantTensor, assign: bool) -> str | None:
        """Why `weight` cannot be loaded, or None. `assign` replaces the data, so only the logical shape must agree."""
        own = self.weight
        names = ("shape",) if assign else ("shape", "bps", "lattice", "tile", "code", "seed", "packing")
        for name in names:
            if getattr(own, name) != getattr(weight, name):
                return f"{name} must be {getattr(own, name)}, got {getattr(weight, name)}"
        if not assign and own.qdata.dtype != weight.qdata.dtype:
            return f"qdata must be {own.qdata.dtype}, got {weight.qdata.dtype}"
        if not assign and (own.act_pre_scale is None) != (weight.act_pre_scale is None):
            return "act_pre_scale must be present in both or in neither"
        return None

    def extra_repr(self) -> str:
        packing = "" if self.codes_scale is None else ", packing='codes'"
        return f"{super().extra_repr()}, bps={self.bps:g}, lattice={self.lattice!r}, tile={self.tile}{packing}"
