"""Quantization-aware training in torchao's two steps: prepare, train, convert.

    quantize_(model, HyperQuantQATConfig(config))            # linear layers now compute with quantized weights
    ...                                                      # train
    quantize_(model, QATConfig(config, step="convert"))      # torchao's own convert step: packed weights

where `config = hyperquant_weight(bps=3)`. torchao's prepare step knows its own formats only, hence `HyperQuantQATConfig`.

Definition.  Forward: `dequantize(quantize(W))`, exactly the weight that convert stores. Backward: the gradient passes to W unchanged
             (straight-through).
Cost.        One quantization of every weight per forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.qat import FakeQuantizerBase
from torchao.quantization.qat.linear import FakeQuantizedLinear
from torchao.quantization.transform_module import register_quantize_module_handler

from ..format.rates import weight_layout
from ..quantize import HyperQuantWeightConfig, column_scale
from ..tensor import HyperQuantTensor


@dataclass
class HyperQuantQATConfig(AOBaseConfig):
    """Prepare linear layers for quantization-aware training.

    Args:
        base_config: what the layers will be converted to.

    Raises:
        TypeError: `base_config` is not made by `hyperquant_weight`.
    """

    base_config: HyperQuantWeightConfig = field(default_factory=HyperQuantWeightConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.base_config, HyperQuantWeightConfig):
            raise TypeError(f"base_config must be a HyperQuantWeightConfig, got {type(self.base_config).__name__}")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, config: HyperQuantWeightConfig) -> torch.Tensor:
        scale = column_scale(weight) if config.balance_columns else None
        return HyperQuantTensor.from_hp(
            weight, config.bps, config.lattice, config.tile, config.seed, scale, effort=config.effort
        ).dequantize()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, None


class HyperQuantFakeQuantizer(FakeQuantizerBase):
    """A weight `[N, K]` as it will be after conversion, differentiable. `enabled = False` passes the weight through."""

    def __init__(self, config: HyperQuantWeightConfig):
        super().__init__()
        self.config = config
        self.enabled = True

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return _StraightThrough.apply(weight, self.config) if self.enabled else weight


@register_quantize_module_handler(HyperQuantQATConfig)
def _prepare(module: nn.Module, config: HyperQuantQATConfig) -> nn.Module:
    if type(module) is not nn.Linear:
        raise TypeError(f"quantization-aware training needs a torch.nn.Linear, got {type(module).__name__}")
    base = config.base_config
    if weight_layout(module.in_features, base.bps, base.lattice, base.tile).padding > base.max_padding:
        # convert leaves it alone, too, and warns
        return module
    prepared = FakeQuantizedLinear.from_linear(module).train(module.training)
    prepared.weight_fake_quantizer = HyperQuantFakeQuantizer(base)
    return prepared
