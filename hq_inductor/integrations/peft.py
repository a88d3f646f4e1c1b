"""LoRA over frozen HyperQuant weights with peft.

    model = get_peft_model(model, hyperquant_lora(LoraConfig(r=8, target_modules=["q_proj", "v_proj"])))

Without `hyperquant_lora`, peft's own torchao layer takes over: training is the same, but it quantizes again to undo a merge, so that every
merge and unmerge adds quantization noise. `HyperQuantLoraLinear` quantizes once per merge and unmerges exactly.
"""

from __future__ import annotations

import functools
import warnings

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge

from ..format.quantizer import check_effort
from ..module import HyperQuantLinear
from ..tensor import HyperQuantTensor


class HyperQuantLoraLinear(Linear):
    """A `HyperQuantLinear` with adapters. Memory: the packed words; a merged layer keeps the words of before, to unmerge.

    Args:
        base_layer, adapter_name, config: as peft gives them.
        effort: of the encoder when adapters are merged, as in `hyperquant_weight`.

    Raises:
        ValueError: `lora_bias` is set. NotImplementedError: a variant such as DoRA, which computes with the float weight.
    """

    def __init__(self, base_layer: HyperQuantLinear, adapter_name: str, config: LoraConfig, effort: int = 1, **kwargs):
        if config.lora_bias:
            raise ValueError("lora_bias must be False for a HyperQuantLinear, got True")
        variant = self.resolve_lora_variant(config=config)
        if variant is not None:
            raise NotImplementedError(f"adapters of a HyperQuantLinear must be plain LoRA, got {type(variant).__name__}")
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._before_merge: HyperQuantTensor | None = None
        self.effort = effort

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantize base weight plus adapters into a new packed weight, at the rate of the old one.

        Args:
            safe_merge: refuse adapters that are not finite. The quantizer refuses them in any case, and nothing is changed then.
            adapter_names: adapters to merge; None means the active ones.

        Raises:
            ValueError: an adapter is not finite.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not adapter_names:
            return
        base = self.get_base_layer()
        # from the original words: merging adapters one after the other does not add up noise
        original = base.weight if self._before_merge is None else self._before_merge
        merged = original.dequantize(torch.float32)
        for name in [*self.merged_adapters, *adapter_names]:
            merged += self.get_delta_weight(name).to(torch.float32)
        old = base.weight
        packed = HyperQuantTensor.from_hp(
            merged.to(old.dtype),
            old.bps,
            old.lattice,
            old.tile,
            old.seed,
            old.act_pre_scale,
            old.mma,
            self.effort,
            packing=old.packing,
        )
        base.weight = packed
        self._before_merge = original
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Put the words of before the merge back, bit for bit."""
        if self._before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.get_base_layer().weight = self._before_merge
        self._before_merge = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.HyperQuantLoraLinear", "HyperQuantLoraLinear", 1)


def hyperquant_lora(config: LoraConfig, effort: int = 1) -> LoraConfig:
    """Tell a `LoraConfig` to wrap `HyperQuantLinear` layers in `HyperQuantLoraLinear`; returns the same config.

    Args:
        config: of the adapters.
        effort: of the encoder when adapters are merged, as in `hyperquant_weight`: packed weights do not record theirs.

    Raises:
        ValueError: `effort` is not 0, 1 or 2.
    """
    check_effort(effort)
    config._register_custom_module({HyperQuantLinear: functools.partial(HyperQuantLoraLinear, effort=effort)})
    return config
