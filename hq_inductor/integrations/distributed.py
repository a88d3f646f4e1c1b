"""Tensor parallelism for packed weights: the styles of `torch.distributed.tensor.parallel` that also know `HyperQuantLinear`.

    parallelize_module(model, mesh, {"up": HyperQuantColwiseParallel(), "down": HyperQuantRowwiseParallel()})

Each rank keeps a slice of the words as a plain parameter, so the compiled graph sees no DTensor and no subclass. Layers that are not
quantized are handled by the style's parent class. `quantize_` of an already sharded (DTensor) weight works without this module.

FSDP2 needs nothing from here from torch 2.13 on: `fully_shard` shards the words of a `HyperQuantLinear` by rows and gathers words, not
dequantized weights. Before, it takes no integers: `unshardable` says what to leave out.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from ..module import HyperQuantLinear


def unshardable(module: nn.Module) -> set[nn.Parameter]:
    """What `fully_shard(module, ignored_params=...)` must leave whole on every rank: integer words on torch before 2.13, else nothing.

    Source: https://github.com/pytorch/pytorch/issues/177844.
    """
    if torch.__version__ >= (2, 13):
        return set()
    return {parameter for parameter in module.parameters() if not parameter.is_floating_point()}


def shard_linear(module: HyperQuantLinear, mesh: DeviceMesh, dim: int) -> None:
    """Keep this rank's slice of a layer, in place.

    Args:
        module: the whole layer, the same on all ranks.
        mesh: 1-D; slices follow its order.
        dim: 0 shards output features and the bias; 1 shards input features, and the bias stays on the first rank, whose output is summed
            with the others'.

    Raises:
        ValueError: the features do not divide into equal slices (of whole tiles, for input features).
    """
    rank, ranks = mesh.get_local_rank(), mesh.size()
    weight = module.weight
    size, unit = weight.shape[dim], 1 if dim == 0 else weight.tile
    if size % (ranks * unit):
        what = "out_features" if dim == 0 else f"in_features in tiles of {unit}"
        raise ValueError(f"{what} must divide by {ranks} ranks, got {size}" + ("" if dim == 0 else "; quantize with a smaller tile"))
    length = size // ranks
    # a copy: a view would keep the whole weight alive
    local = weight.narrow(dim, rank * length, length).clone()
    if dim == 0:
        module.out_features = length
        if module.bias is not None:
            bias = module.bias.detach().narrow(0, rank * length, length).clone()
            module.bias = nn.Parameter(bias, requires_grad=module.bias.requires_grad)
    else:
        module.in_features = length
        if rank:
            module.bias = None
    module.weight = local


class HyperQuantColwiseParallel(ColwiseParallel):
    """`ColwiseParallel` (output features sharded) for float and for packed linear layers. Arguments as there."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, HyperQuantLinear):
            return super()._apply(module, device_mesh)
        shard_linear(module, device_mesh, 0)

        def enter(mod, inputs):
            x = self._prepare_input_fn(self.input_layouts, self.desired_input_layouts, mod, inputs, device_mesh)
            # every rank sees the whole input and contributes a part of its gradient
            return x.to_local(grad_placements=(Partial(),))

        def leave(mod, inputs, output: torch.Tensor):
            placed = DTensor.from_local(output, device_mesh, (Shard(-1),), run_check=False)
            return self._prepare_output_fn(self.output_layouts, self.use_local_output, mod, placed, device_mesh)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


class HyperQuantRowwiseParallel(RowwiseParallel):
    """`RowwiseParallel` (input features sharded) for float and for packed linear layers. Arguments as there."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, HyperQuantLinear):
            return super()._apply(module, device_mesh)
        shard_linear(module, device_mesh, 1)

        def enter(mod, inputs):
            return self._prepare_input_fn(self.input_layouts, (Shard(-1),), mod, inputs, device_mesh).to_local()

        def leave(mod, inputs, output: torch.Tensor):
            placed = DTensor.from_local(output, device_mesh, (Partial(),), run_check=False)
            return self._prepare_output_fn(self.output_layouts, self.use_local_output, mod, placed, device_mesh)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module
