"""`hyperquant_weight`: the config for torchao's `quantize_`, its handler, and a report of what was stored."""

from __future__ import annotations

import types
import warnings
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor
from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from .balance import column_scale
from .format.codes import check_packing
from .format.mma import check_mma
from .format.quantizer import check_effort
from .format.rates import MAX_PADDING, check_rate, check_tile, weight_layout
from .module import HyperQuantLinear
from .tensor import HyperQuantTensor


@dataclass
class HyperQuantWeightConfig(AOBaseConfig):
    """Entropy-coded lattice weights at an exact rate, for `torchao.quantization.quantize_`.

    Args:
        bps: bits per scalar, scales included: a multiple of 1/8 up to 6, from 1.75 (e8) or 2 (others).
        lattice: `"e8"` (best), `"d4"`, `"a2"` or `"z"`.
        tile: coefficients that share a scale and a bit budget, a multiple of 128; None chooses by layer.
        seed: selects the random signs of the Hadamard transform; layers that share an input should share it.
        balance_columns: divide each weight column by the square root of its size, and multiply the activation by it, which lowers the
            output error where columns differ. Adds 16 bits per column (16 / out_features bits per weight). The function
            `hq_inductor.balance_columns` knows the activations too and mostly adds no bits; its layers ignore this switch.
        mma: number format of the products: `"auto"` (by batch size, no less accurate than int8), `"int8"`, `"fp8"`, `"bf16"`,
            `"nvfp4"` or `"mxfp4"`; see `hq_inductor.format.mma` and `hq_inductor.ops.linear`.
        max_padding: layers whose columns need more padding than this share are left alone, with a warning.
        effort: 0, 1 or 2, how hard the encoder tries (`HyperQuantTensor.from_hp`); decoding is the same.
        check_values: refuse weights with NaN, inf or values too large. False is for servers that make room for packed weights by
            quantizing uninitialized memory.
        packing: `"rice"`, words at `bps`. `"codes"`: the same weights as the tensor cores take them, for the fastest prefill: int8 codes in
            8 + 32 / tile bits per weight, or with `mma="fp8"` e4m3 in 8 + 32 / K (`hq_inductor.format.codes`); `bps` is then the rate whose
            precision they have, and 6 costs no more than 2.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    bps: float = 4.0
    lattice: str = "e8"
    tile: int | None = None
    seed: int = 0
    balance_columns: bool = False
    max_padding: float = MAX_PADDING
    mma: str = "auto"
    effort: int = 1
    check_values: bool = True
    packing: str = "rice"

    def __post_init__(self) -> None:
        check_rate(self.bps, self.lattice)
        check_tile(self.tile)
        check_effort(self.effort)
        check_mma(self.mma)
        check_packing(self.packing, self.mma)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be an integer from 0 to 2**31 - 1, got {self.seed!r}")
        if not isinstance(self.balance_columns, bool):
            raise TypeError(f"balance_columns must be a bool, got {type(self.balance_columns).__name__}")
        if not isinstance(self.check_values, bool):
            raise TypeError(f"check_values must be a bool, got {type(self.check_values).__name__}")
        if not self.max_padding >= 0:
            raise ValueError(f"max_padding must be at least 0, got {self.max_padding!r}")


def hyperquant_weight(
    bps: float = 4.0,
    lattice: str = "e8",
    tile: int | None = None,
    seed: int = 0,
    balance_columns: bool = False,
    max_padding: float = MAX_PADDING,
    mma: str = "auto",
    effort: int = 1,
    check_values: bool = True,
    packing: str = "rice",
    allocation: str = "uniform",
) -> HyperQuantWeightConfig:
    """The config for `quantize_(model, hyperquant_weight(bps=4))`.

    Args:
        allocation: `"uniform"`, one rate for all layers. Rates by layer need the whole model and some inputs, and a config sees one layer
            at a time: `"sensitivity"` is refused with a pointer to `hq_inductor.allocate_rates`, which returns a config for all of them.
        bps and the others: as in `HyperQuantWeightConfig`.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """
    if allocation == "sensitivity":
        raise ValueError(
            'allocation must be "uniform" here, got "sensitivity": sensitivities are measured on the whole model with a few inputs, so use '
            f"quantize_(model, allocate_rates(model, {bps!r}, batches), filter_fn=None) from hq_inductor"
        )
    if allocation != "uniform":
        raise ValueError(f'allocation must be "uniform" (or allocate_rates be used), got {allocation!r}')
    return HyperQuantWeightConfig(bps, lattice, tile, seed, balance_columns, max_padding, mma, effort, check_values, packing)


def why_left_alone(in_features: int, config: HyperQuantWeightConfig) -> str | None:
    """The reason not to quantize a layer, or None."""
    layout = weight_layout(in_features, config.bps, config.lattice, config.tile)
    if layout.padding > config.max_padding:
        return (
            f"{in_features} input features would be padded to {layout.padded_features} "
            f"({layout.padding:.0%} more bits; max_padding is {config.max_padding:.0%})"
        )
    return None


@register_quantize_module_handler(HyperQuantWeightConfig)
def _quantize_module(module: nn.Module, config: HyperQuantWeightConfig, *, parameter_name: str = "weight") -> nn.Module:
    weight = getattr(module, parameter_name)
    if isinstance(weight, DTensor):
        return _quantize_shard(module, config, parameter_name)
    if isinstance(weight, HyperQuantTensor):
        raise ValueError(f"{type(module).__name__}.{parameter_name} is already a HyperQuantTensor; quantize the original weights")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"{type(module).__name__}.{parameter_name} must be floating point, got {weight.dtype}")
    if weight.dim() not in (2, 3):
        raise ValueError(f"{type(module).__name__}.{parameter_name} must be a matrix or a stack of them, got shape {tuple(weight.shape)}")
    if weight.dim() == 3 and config.balance_columns:
        raise ValueError(f"balance_columns must be False for a stack of matrices ({type(module).__name__}.{parameter_name}), got True")
    reason = why_left_alone(weight.shape[-1], config)
    if reason is not None:
        warnings.warn(f"{module}: {parameter_name} left unquantized: {reason}", stacklevel=2)
        return module
    # from `hq_inductor.balance_columns`, which knows the activations
    scale = getattr(module, "balance_scale", None)
    if scale is None and config.balance_columns:
        scale = column_scale(weight)
    # from `hq_inductor.measure_moments`
    moments = getattr(module, "input_moments", None)
    packed = HyperQuantTensor.from_hp(
        weight,
        config.bps,
        config.lattice,
        config.tile,
        config.seed,
        scale,
        config.mma,
        config.effort,
        config.check_values,
        moments,
        config.packing,
    )
    for name in ("balance_scale", "input_moments"):
        if name in module._buffers:
            delattr(module, name)
    if type(module) is nn.Linear and parameter_name == "weight" and packed.dim() == 2:
        return HyperQuantLinear.from_linear(module, packed)
    setattr(module, parameter_name, nn.Parameter(packed, requires_grad=False))
    module.extra_repr = types.MethodType(_subclass_extra_repr, module)
    return module


def _quantize_shard(module: nn.Module, config: HyperQuantWeightConfig, parameter_name: str) -> nn.Module:
    """Quantize each rank's shard of a DTensor parameter by itself; rows, and columns at multiples of the tile, are independent."""
    weight = getattr(module, parameter_name)
    shard = nn.Module()
    shard.register_parameter(parameter_name, nn.Parameter(weight.to_local().detach(), requires_grad=False))
    packed = getattr(_quantize_module(shard, config, parameter_name=parameter_name), parameter_name)
    if isinstance(packed, HyperQuantTensor):
        placed = DTensor.from_local(
            packed, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
        setattr(module, parameter_name, nn.Parameter(placed, requires_grad=False))
    return module


def _subclass_extra_repr(module: nn.Module) -> str:
    return f"{type(module).extra_repr(module)}, weight={getattr(module, 'weight', None)!r}"


# config_to_dict stores only the class name; config_from_dict looks it up in these modules
ALLOWED_AO_MODULES.add("hq_inductor")
