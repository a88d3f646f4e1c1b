"""What each process of test_integrations_distributed runs. Every check compares with the same model in one process."""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torchao.quantization import quantize_
from torchao.testing.utils import TorchAOTensorParallelTestCase

from hq_inductor import HyperQuantLinear, HyperQuantTensor, hyperquant_weight
from hq_inductor.integrations.distributed import HyperQuantColwiseParallel, HyperQuantRowwiseParallel, unshardable

# four shards of 256 columns: two tiles each
CONFIG = hyperquant_weight(bps=4, tile=128)


class MLP(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(512, 1024, bias=bias)
        self.down = nn.Linear(1024, 512, bias=bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def model_and_input(bias=True):
    torch.manual_seed(0)
    return MLP(bias), torch.randn(8, 512)


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def check_tensor_parallel_of_packed_layers():
    model, x = model_and_input()
    quantize_(model, CONFIG)
    y = x.clone().requires_grad_()
    expected = model(y)
    expected.square().sum().backward()
    sharded = copy.deepcopy(model)
    parallelize_module(sharded, mesh(), {"up": HyperQuantColwiseParallel(), "down": HyperQuantRowwiseParallel()})
    ranks = dist.get_world_size()
    assert isinstance(sharded.up, HyperQuantLinear) and type(sharded.up.qdata.data) is torch.Tensor
    assert sharded.up.weight.shape == (1024 // ranks, 512) and sharded.down.weight.shape == (512, 1024 // ranks)
    assert sharded.up.qdata.untyped_storage().nbytes() * ranks == model.up.qdata.untyped_storage().nbytes()
    z = x.clone().requires_grad_()
    found = sharded(z)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    torch.testing.assert_close(z.grad, y.grad, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(sharded, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


def check_styles_leave_float_layers_to_torch():
    model, x = model_and_input()
    expected = model(x)
    quantize_(model, CONFIG, filter_fn=lambda module, name: name == "down")
    expected = model(x)
    parallelize_module(model, mesh(), {"up": HyperQuantColwiseParallel(), "down": HyperQuantRowwiseParallel()})
    assert isinstance(model.up.weight, DTensor) and isinstance(model.down, HyperQuantLinear)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def check_uneven_shards_are_refused():
    model = nn.Sequential(nn.Linear(256, 30))
    quantize_(model, hyperquant_weight(bps=4, tile=256))
    for style, message in ((HyperQuantColwiseParallel, "out_features must divide by 4"), (HyperQuantRowwiseParallel, "in tiles of 256")):
        try:
            parallelize_module(model, mesh(), {"0": style()})
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{style.__name__} accepted uneven shards")


def check_quantizing_sharded_weights():
    """Quantizing the shards gives the words that sharding the quantized weight gives."""
    model, x = model_and_input()
    whole = copy.deepcopy(model)
    quantize_(whole, CONFIG)
    expected = whole(x)
    parallelize_module(model, mesh(), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    quantize_(model, CONFIG)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, dim in (("up", 0), ("down", 1)):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, DTensor) and not weight.requires_grad
        local, reference = weight.to_local(), whole.get_submodule(name).weight
        assert isinstance(local, HyperQuantTensor)
        size = reference.shape[dim] // ranks
        assert torch.equal(local.qdata, reference.narrow(dim, rank * size, size).qdata)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


class _Linear(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x):
        return self.linear(x)


def check_torchao_tensor_parallel_test_case():
    """The comparison that torchao's test leaves out, with its sharding functions."""
    case = TorchAOTensorParallelTestCase
    for dtype in case.COMMON_DTYPES:
        torch.manual_seed(5)
        up, down = _Linear(512, 1024).to(dtype), _Linear(1024, 512).to(dtype)
        x = 100 * torch.randn(16, 512, dtype=dtype)
        for module in (up, down):
            quantize_(module, hyperquant_weight(bps=4, tile=256))
        expected = down(up(x))
        up_dist, down_dist = case.colwise_shard(up, mesh()), case.rowwise_shard(down, mesh())
        placed = DTensor.from_local(x, mesh(), [Replicate()])
        found = down_dist(up_dist(placed)).full_tensor()
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        # each rank rounds its partial sum to the dtype once more
        assert error < 4 * torch.finfo(dtype).eps, (dtype, error)
        with torch.no_grad():
            compiled = torch.compile(down_dist, backend="aot_eager")(torch.compile(up_dist, backend="aot_eager")(placed)).full_tensor()
        assert (compiled.double() - found.double()).norm() / found.double().norm() < 2 * torch.finfo(dtype).eps


class Adapted(nn.Module):
    """A frozen layer with a small trained one beside it."""

    def __init__(self, base: nn.Module, rank: int = 4):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapted_model(face: bool):
    model, x = model_and_input(bias=False)
    quantize_(model, CONFIG)
    for name in ("up", "down"):
        base = model.get_submodule(name)
        if face:  # the subclass itself as parameter, as in modules that are no exact nn.Linear
            weight = base.weight
            del base.weight
            base.weight = nn.Parameter(weight, requires_grad=False)
        setattr(model, name, Adapted(base))
    return model, x


def train(model, x, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class GatheredBytes:
    """Counts the bytes that FSDP2 gathers; torch has renamed the function it calls."""

    names = tuple(name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name))

    def __enter__(self):
        self.count = 0
        self.originals = {name: getattr(dist, name) for name in self.names}
        for name, original in self.originals.items():

            def counting(output_tensor, *args, original=original, **kwargs):
                self.count += output_tensor.numel() * output_tensor.element_size()
                return original(output_tensor, *args, **kwargs)

            setattr(dist, name, counting)
        return self

    def __exit__(self, *exception):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def _check_fsdp(face: bool, compiled: bool = False):
    model, x = adapted_model(face)
    twin = copy.deepcopy(model)
    expected = train(twin, x)
    whole = unshardable(model)
    for block in (model.up, model.down):
        fully_shard(block, mesh=mesh(), ignored_params=whole)
    fully_shard(model, mesh=mesh(), ignored_params=whole)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert isinstance(parameter, DTensor) != (parameter in whole), name
    with GatheredBytes() as gathered:
        if compiled:
            model(x)
        found = train(torch.compile(model, backend="aot_eager") if compiled else model, x)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert found[-1] < found[0]
    dense = sum(2 * 512 * 1024 * 4 for _ in range(3))
    # words and adapters, in forward and again in backward, are still less than the float weights once
    assert 0 < gathered.count < dense / 2, (gathered.count, dense)


def check_fsdp2_of_packed_layers():
    _check_fsdp(face=False)


def check_fsdp2_of_subclass_parameters():
    _check_fsdp(face=True)


def check_fsdp2_mixed_precision():
    """A mixed-precision policy casts adapters and leaves words alone."""
    model, x = adapted_model(face=False)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    twin = copy.deepcopy(model)
    for block in (model.up, model.down):
        fully_shard(block, mesh=mesh(), mp_policy=policy, ignored_params=unshardable(block))
    with torch.no_grad():
        exact, found = twin(x), model(x)
    assert (found - exact).norm() / exact.norm() < 0.02


def check_fsdp2_state_dict():
    """Sharded words gather back to the whole weight."""
    model, _ = adapted_model(face=False)
    whole = model.up.base.qdata.clone()
    kept = unshardable(model.up)
    fully_shard(model.up, mesh=mesh(), ignored_params=kept)
    weight = model.state_dict()["up.base.weight"]
    assert isinstance(weight, HyperQuantTensor) and weight.shape == (1024, 512)
    assert torch.equal(
        (weight if kept else weight._replace(qdata=weight.qdata.full_tensor())).dequantize(),
        HyperQuantTensor(whole, **weight.__tensor_flatten__()[1]).dequantize(),
    )


def run(rank: int, ranks: int, store: str, names: tuple[str, ...]) -> None:
    """Entry point of a process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        for name in names:
            try:
                getattr(sys.modules[__name__], name)()
            except Exception as error:
                raise AssertionError(f"{name} failed on rank {rank} of {ranks}") from error
            dist.barrier()
    finally:
        dist.destroy_process_group()
