"""`HyperQuantTensor`: a linear layer's weight as entropy-coded lattice tiles, in torchao's tensor-subclass form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchao.utils import TorchAOBaseTensor

from .format.hadamard import hadamard_block
from .format.layout import FORMAT_VERSION, MAX_SCALE
from .format.mma import check_mma
from .format.rates import WeightLayout, weight_layout
from .ops.registry import tile_layout

aten = torch.ops.aten


class HyperQuantTensor(TorchAOBaseTensor):
    """A 2-D weight `[N, K]` stored as `qdata` words.

    Tensor attributes:
        qdata: `[N, tiles, words]` int32, see `hq_inductor.format.layout`. Its bits are all that is stored at `bps`.
        act_pre_scale: optional `[K]` bf16, multiplies activations; column i of the coded weight was divided by it.

    Non-tensor attributes:
        shape: logical shape, `(N, K)`, or `(K, N)` if `transposed`.
        bps: bits per scalar asked for; `bits_per_weight` is what is stored.
        lattice, tile, code: the layout of a tile, together with `words` (`TileLayout`).
        seed: selects the signs of the randomized Hadamard transform.
        dtype: dtype of `dequantize()`; activations of any floating dtype are accepted.
        transposed: whether this is the face of `weight.t()`.
        format_version: version of the bitstream; other versions are refused.
        mma: number format of products with it (`hq_inductor.format.mma`).
    """

    tensor_data_names = ["qdata"]
    tensor_attribute_names = [
        "shape",
        "bps",
        "lattice",
        "tile",
        "code",
        "seed",
        "dtype",
        "transposed",
        "format_version",
        "mma",
    ]
    optional_tensor_data_names = ["act_pre_scale"]

    def __new__(
        cls,
        qdata: torch.Tensor,
        shape,
        bps: float,
        lattice: str,
        tile: int,
        code: int,
        seed: int,
        dtype: torch.dtype,
        transposed: bool = False,
        format_version: int = FORMAT_VERSION,
        mma: str = "auto",
        act_pre_scale: torch.Tensor | None = None,
    ):
        if format_version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {format_version}: written by another version of hq_inductor")
        return torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=qdata.device, requires_grad=False)

    def __init__(
        self,
        qdata: torch.Tensor,
        shape,
        bps: float,
        lattice: str,
        tile: int,
        code: int,
        seed: int,
        dtype: torch.dtype,
        transposed: bool = False,
        format_version: int = FORMAT_VERSION,
        mma: str = "auto",
        act_pre_scale: torch.Tensor | None = None,
    ):
        super().__init__()
        self.qdata = qdata
        self.bps = bps
        self.lattice = lattice
        self.tile = tile
        self.code = code
        self.seed = seed
        self.transposed = transposed
        self.format_version = format_version
        self.mma = mma
        self.act_pre_scale = act_pre_scale

    @classmethod
    def from_hp(
        cls,
        hp_tensor: torch.Tensor,
        bps: float = 4.0,
        lattice: str = "e8",
        tile: int | None = None,
        seed: int = 0,
        act_pre_scale: torch.Tensor | None = None,
        mma: str = "auto",
        effort: int = 1,
    ) -> HyperQuantTensor:
        """Quantize a weight.

        Args:
            hp_tensor: `[N, K]`, floating point, finite.
            bps: bits per scalar, scales included: a multiple of 1/8 from 1.75 (e8; others 2) to 6.
            lattice: `"e8"`, `"d4"`, `"a2"` or `"z"`.
            tile: coefficients per tile, a multiple of 128; None chooses by K and rate (`choose_tile`).
            seed: selects the signs of the randomized Hadamard transform.
            act_pre_scale: `[K]`, positive; the weight is divided by it and activations are multiplied by it. Adds 16 bits per column.
            mma: number format of products with it: `"auto"`, `"int8"`, `"fp8"`, `"bf16"`, `"nvfp4"` or `"mxfp4"`.
            effort: 0 rounds to the nearest lattice point; 1 rounds by error and bits together, 0.1 to 0.5 dB better; 2 takes ten times as
                long for another 0.05 dB. The decoder's work is the same.

        Raises:
            TypeError: `hp_tensor` is not floating point.
            ValueError: `hp_tensor` is not 2-D, is empty, has NaN, inf or values too large; or another argument is out of range.

        Note: K that is not a multiple of the tile is padded with zero columns, which count in `bits_per_weight`.
        """
        if not hp_tensor.dtype.is_floating_point:
            raise TypeError(f"weight must be floating point, got {hp_tensor.dtype}")
        if hp_tensor.dim() != 2 or hp_tensor.numel() == 0:
            raise ValueError(f"weight must be a nonempty matrix [N, K], got shape {tuple(hp_tensor.shape)}")
        rows, columns = hp_tensor.shape
        check_mma(mma)
        layout = weight_layout(columns, bps, lattice, tile)
        weight = hp_tensor.detach().to(torch.float32)
        if act_pre_scale is not None:
            if act_pre_scale.shape != (columns,):
                raise ValueError(f"act_pre_scale must have shape ({columns},), got {tuple(act_pre_scale.shape)}")
            act_pre_scale = act_pre_scale.detach().to(torch.bfloat16)
            weight = weight / act_pre_scale.to(torch.float32)
        _check_values(weight)
        t = layout.tile
        qdata = _encode(weight, layout, seed, effort)
        return cls(qdata, (rows, columns), float(bps), lattice, t.tile, t.code, seed, hp_tensor.dtype, act_pre_scale=act_pre_scale)

    def __tensor_flatten__(self):
        # written out because torch 2.11 calls it for every parameter and step, and the generic one looks every list up again
        names = ["qdata"] if self.act_pre_scale is None else ["qdata", "act_pre_scale"]
        return names, {
            "shape": self.shape,
            "bps": self.bps,
            "lattice": self.lattice,
            "tile": self.tile,
            "code": self.code,
            "seed": self.seed,
            "dtype": self.dtype,
            "transposed": self.transposed,
            "format_version": self.format_version,
            "mma": self.mma,
        }

    @classmethod
    def __tensor_unflatten__(cls, tensors, attributes, outer_size, outer_stride):
        return cls(tensors["qdata"], act_pre_scale=tensors.get("act_pre_scale"), **attributes)

    def _stable_hash_for_caching(self) -> str:
        return repr((self.__tensor_flatten__(), tuple(self.qdata.shape)))

    def _replace(self, **changes) -> HyperQuantTensor:
        """A copy of the face with other tensors or attributes."""
        _, attributes = self.__tensor_flatten__()
        return type(self)(**{"qdata": self.qdata, "act_pre_scale": self.act_pre_scale, **attributes, **changes})

    @property
    def in_features(self) -> int:
        return self.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self.shape[1 if self.transposed else 0]

    @property
    def size_bytes(self) -> int:
        """Bytes stored: the words, and the column scales if there are any."""
        size = self.qdata.numel() * self.qdata.element_size()
        if self.act_pre_scale is not None:
            size += self.act_pre_scale.numel() * self.act_pre_scale.element_size()
        return size

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight, scales and padding included."""
        return 8 * self.size_bytes / self.numel()

    def dequantize(self, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as a plain tensor, `self.shape`, in `output_dtype` (default: `self.dtype`)."""
        ops = torch.ops.hyperquant
        codes, scale = ops.rice_decode(self.qdata, self.lattice, self.tile, self.code)
        rotated = ops.lattice_dequant(codes, scale, self.lattice, torch.float32)
        weight = ops.hadamard(rotated, hadamard_block(self.tile), self.seed, True)[:, : self.in_features]
        if self.act_pre_scale is not None:
            weight = weight * self.act_pre_scale.to(torch.float32)
        weight = weight.to(output_dtype or self.dtype)
        return weight.t() if self.transposed else weight.contiguous()

    def __repr__(self, *, tensor_contents=None) -> str:
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, bps={self.bps:g}, lattice={self.lattice!r}, tile={self.tile}, "
            f"bytes={self.size_bytes}, bits_per_weight={self.bits_per_weight:.4g}, dtype={self.dtype}, device='{self.device}')"
        )


def _check_values(weight: torch.Tensor) -> None:
    """Refuse weights that no scale can represent. Not possible where there are no values yet (meta tensors, tracing)."""
    if weight.device.type == "meta" or torch.compiler.is_compiling():
        return
    finite, largest = torch.stack((weight.isfinite().all().to(torch.float32), weight.abs().amax())).tolist()
    if not finite:
        raise ValueError("weight must be finite, got NaN or inf")
    # the transform may gather a whole block (at most 512) of such values in one coefficient: sqrt(512) < 32
    limit = MAX_SCALE * 64 / 32
    if largest > limit:
        raise ValueError(f"weight values must be at most {limit:.3g} in magnitude, got {largest:.3g}")


def _encode(weight: torch.Tensor, layout: WeightLayout, seed: int, effort: int) -> torch.Tensor:
    ops, t = torch.ops.hyperquant, layout.tile
    padded = F.pad(weight, (0, layout.padded_features - layout.in_features))
    rotated = ops.hadamard(padded, hadamard_block(t.tile), seed, False)
    codes, scale = ops.lattice_quantize(rotated, t.lattice, t.tile, t.code, t.words, layout.start_rms, effort)
    return ops.rice_encode(codes, scale, t.lattice, t.tile, t.code, t.words)


def linear(x: torch.Tensor, weight: HyperQuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` with a quantized weight: one `hyperquant::rice_linear` on its plain tensors."""
    if weight.transposed:
        raise NotImplementedError("linear with a transposed HyperQuantTensor is not supported; use weight.t() of it")
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x must have {weight.in_features} features in its last dimension, got shape {tuple(x.shape)}")
    return torch.ops.hyperquant.rice_linear(
        x, weight.qdata, weight.act_pre_scale, bias, weight.lattice, weight.tile, weight.code, weight.seed, weight.mma
    )


implements = HyperQuantTensor.implements


@HyperQuantTensor.implements_torch_function(F.linear)
def _(func, types, args, kwargs):
    def call(input, weight, bias=None):
        if not isinstance(weight, HyperQuantTensor):
            raise NotImplementedError("F.linear takes a HyperQuantTensor as weight only")
        return linear(input, weight, bias)

    return call(*args, **kwargs)


@implements(aten.linear.default)
def _(func, types, args, kwargs):
    return linear(*args, **kwargs)


def _as_weight(matrix: torch.Tensor) -> HyperQuantTensor:
    """The weight W of a right operand `W.t()`."""
    if not isinstance(matrix, HyperQuantTensor) or not matrix.transposed:
        raise NotImplementedError("a HyperQuantTensor can only be the right operand of a product, and transposed: x @ weight.t()")
    return matrix._replace(shape=tuple(reversed(matrix.shape)), transposed=False)


@implements([aten.mm.default, aten.matmul.default])
def _(func, types, args, kwargs):
    return linear(args[0], _as_weight(args[1]))


@implements(aten.addmm.default)
def _(func, types, args, kwargs):
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        raise NotImplementedError("addmm with a HyperQuantTensor needs beta=1 and alpha=1")
    bias, x, matrix = args
    if bias.dim() == 1:
        return linear(x, _as_weight(matrix), bias)
    return bias + linear(x, _as_weight(matrix))


@implements(aten.t.default)
def _(func, types, args, kwargs):
    weight = args[0]
    return weight._replace(shape=tuple(reversed(weight.shape)), transposed=not weight.transposed)


@implements(aten.transpose.int)
def _(func, types, args, kwargs):
    weight, dim0, dim1 = args
    if dim0 % 2 == dim1 % 2:
        return weight._replace()
    return weight._replace(shape=tuple(reversed(weight.shape)), transposed=not weight.transposed)


@implements([aten.view.default, aten._unsafe_view.default, aten.reshape.default])
def _(func, types, args, kwargs):
    weight, shape = args
    if tuple(shape) not in (tuple(weight.shape), (-1, weight.shape[1]), (weight.shape[0], -1)):
        raise NotImplementedError(f"a HyperQuantTensor of shape {tuple(weight.shape)} cannot be viewed as {tuple(shape)}")
    return weight._replace()


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    weight = args[0]
    to = weight._get_to_kwargs(*args[1:], **kwargs)
    if not to["dtype"].is_floating_point:
        raise TypeError(f"a HyperQuantTensor can only be converted to a floating dtype, got {to['dtype']}")

    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(to["device"], non_blocking=to["non_blocking"], copy=True)

    return weight._replace(qdata=move(weight.qdata), act_pre_scale=move(weight.act_pre_scale), dtype=to["dtype"])


@implements(aten.slice.Tensor)
def _(func, types, args, kwargs):
    weight, dim, start, end, step = (*args, *(0, None, None, 1)[len(args) - 1 :])
    dim %= 2
    size = weight.shape[dim]
    start, end, _ = slice(start, end).indices(size)
    if step != 1:
        raise NotImplementedError(f"slices of a HyperQuantTensor need step 1, got {step}")
    shape = list(weight.shape)
    shape[dim] = max(0, end - start)
    if dim == (1 if weight.transposed else 0):
        return weight._replace(qdata=aten.slice.Tensor(weight.qdata, 0, start, end), shape=shape)
    if start % weight.tile or (end % weight.tile and end != size):
        raise ValueError(f"columns of a HyperQuantTensor slice at multiples of tile={weight.tile}, got {start}:{end}")
    scale = weight.act_pre_scale
    return weight._replace(
        qdata=aten.slice.Tensor(weight.qdata, 1, start // weight.tile, -(-end // weight.tile)),
        act_pre_scale=None if scale is None else aten.slice.Tensor(scale, 0, start, end),
        shape=shape,
    )


def check_layout(weight: HyperQuantTensor) -> None:
    """Raise unless the words have the shape that the attributes say; for tensors that come from outside."""
    layout = tile_layout(weight.lattice, weight.tile, weight.code, int(weight.qdata.shape[-1]))
    tiles = -(-weight.in_features // layout.tile)
    if tuple(weight.qdata.shape[:2]) != (weight.out_features, tiles):
        raise ValueError(
            f"qdata of a weight of shape {tuple(weight.shape)} must be [{weight.out_features}, {tiles}, {layout.words}], "
            f"got {tuple(weight.qdata.shape)}"
        )


HyperQuantTensor.__module__ = "hq_inductor"
# lets torch.load(weights_only=True) read state dicts
torch.serialization.add_safe_globals([HyperQuantTensor])
