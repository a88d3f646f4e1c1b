"""The quantization method `hyperquant` of vLLM: checkpoints of `HyperQuantConfig` are served as they are.

Storage.     A layer has the parameter `_weight_qdata`, `[N, tiles, words]` int32: name and shape of the words on disk, so that vLLM's own
             loaders copy shards of it as of any other parameter, rows of column-parallel and merged layers, tiles of row-parallel ones.
             With column scales, also `_weight_act_pre_scale`, `[K]` bf16.
Invariants.  Layers of one merged parameter are stored alike, their column scales are the same. What is not stored as words is refused.
Source.      vLLM's `register_quantization_config`; the plugin (`hq_inductor.integrations.vllm`) imports this module in every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig, config_from_dict
from transformers.quantizers.quantizers_utils import should_convert_module
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from ..format.rates import weight_layout
from ..ops.linear import call_linear
from ..quantize import HyperQuantWeightConfig, why_left_alone
from .safetensors import PackedCheckpoint

METHOD = "hyperquant"


@dataclass(frozen=True)
class PackedLayer:
    """How the weight of a layer is stored; attributes as in `HyperQuantTensor`, and whether it has an `act_pre_scale`."""

    bps: float
    lattice: str
    tile: int | None
    seed: int
    mma: str
    scaled: bool


@register_quantization_config(METHOD)
class HyperQuantVllmConfig(QuantizationConfig):
    """What `config.json` says of a checkpoint, and what its files say.

    Args:
        quant_type: a `HyperQuantWeightConfig`, or torchao's `FqnToConfig` of such.
        skip_modules: names of modules that were kept, or patterns of them, as transformers reads them.
    """

    def __init__(self, quant_type: AOBaseConfig, skip_modules: list[str]):
        super().__init__()
        self.quant_type, self.skip_modules = quant_type, skip_modules
        self.layers: dict[str, PackedLayer] | None = None

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HyperQuantVllmConfig:
        return cls(config_from_dict(config["quant_type"]["default"]), config.get("modules_to_not_convert") or [])

    def maybe_update_config(self, model_name: str, *args, **kwargs) -> None:
        """Read what the files of a directory say of every weight; refuses other format versions before anything is loaded."""
        if not Path(model_name).is_dir():
            return
        checkpoint = PackedCheckpoint(sorted(Path(model_name).glob("*.safetensors")))
        self.layers = {}
        for name in checkpoint.packed:
            weight = checkpoint.weight(name)
            if weight.dim() != 2 or weight.packing != "rice":
                raise NotImplementedError(f"{name}: vLLM serves matrices in words only, got {weight}")
            scaled = weight.act_pre_scale is not None
            self.layers[name] = PackedLayer(weight.bps, weight.lattice, weight.tile, weight.seed, weight.mma, scaled)

    def get_quant_method(self, layer: nn.Module, prefix: str):
        if not isinstance(layer, LinearBase):
            return None
        parent, _, last = prefix.rpartition(".")
        names = [f"{parent}.{name}.weight".lstrip(".") for name in self.packed_modules_mapping.get(last, [last])]
        found = [self._layer(name, layer.input_size) for name in names]
        if any(stored != found[0] for stored in found):
            raise ValueError(f"{', '.join(names)} must be stored alike to be merged, got {found}")
        return UnquantizedLinearMethod() if found[0] is None else HyperQuantLinearMethod(found[0])

    def _layer(self, name: str, in_features: int) -> PackedLayer | None:
        """How a weight is stored, or None if it is not packed."""
        if self.layers is not None:
            return self.layers.get(name)
        config = self.quant_type
        if not isinstance(config, HyperQuantWeightConfig) or config.packing != "rice":
            raise NotImplementedError(f"rates by layer and other packings are read from files: download the model first, got {config}")
        if not should_convert_module(name, self.skip_modules) or why_left_alone(in_features, config):
            return None
        return PackedLayer(config.bps, config.lattice, config.tile, config.seed, config.mma, config.balance_columns)


class HyperQuantLinearMethod(LinearMethodBase):
    """A linear layer of vLLM whose weight is words; one `hyperquant::rice_linear`."""

    def __init__(self, stored: PackedLayer):
        self.stored = stored

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        stored = self.stored
        tile = weight_layout(input_size, stored.bps, stored.lattice, stored.tile).tile
        if input_size_per_partition != input_size and input_size_per_partition % tile.tile:
            raise ValueError(
                f"{input_size} input features must divide among ranks in tiles of {tile.tile}, got {input_size_per_partition} on each; "
                "quantize with a smaller tile"
            )
        tiles = -(-input_size_per_partition // tile.tile)
        qdata = nn.Parameter(torch.empty(sum(output_partition_sizes), tiles, tile.words, dtype=torch.int32), requires_grad=False)
        set_weight_attrs(qdata, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
        layer.register_parameter("_weight_qdata", qdata)
        layer._weight_layout = tile
        if stored.scaled:
            scale = nn.Parameter(torch.ones(input_size_per_partition, dtype=torch.bfloat16), requires_grad=False)
            set_weight_attrs(scale, {"weight_loader": _load_scale(input_size_per_partition != input_size)})
            layer.register_parameter("_weight_act_pre_scale", scale)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        tile, scale = layer._weight_layout, getattr(layer, "_weight_act_pre_scale", None)
        return call_linear(x, layer._weight_qdata, scale, bias, tile.lattice, tile.tile, tile.code, self.stored.seed, self.stored.mma)


def _load_scale(sharded: bool):
    """Loader of column scales, `[K]`: the rank's part, once, and the same for all projections of a merged layer."""
    loaded = False

    def load(parameter: nn.Parameter, scale: torch.Tensor, shard_id=None) -> None:
        nonlocal loaded
        if sharded:
            from vllm.distributed import get_tensor_model_parallel_rank

            size = parameter.shape[0]
            scale = scale.narrow(0, get_tensor_model_parallel_rank() * size, size)
        if loaded and not torch.equal(parameter.data, scale.to(parameter.device)):
            raise ValueError("act_pre_scale must be the same in all projections that vLLM merges; calibrate, or do not balance columns")
        parameter.data.copy_(scale)
        loaded = True

    return load
