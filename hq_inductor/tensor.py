"""`HyperQuantTensor`: a linear layer's weight as entropy-coded lattice tiles, in torchao's tensor-subclass form."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torchao.utils import TorchAOBaseTensor

from .format.codes import check_packing, coefficients, pack_codes
from .format.hadamard import hadamard_block
from .format.layout import FORMAT_VERSION, MAX_SCALE
from .format.mma import check_mma
from .format.quantizer import quantize_with_feedback
from .format.rates import WeightLayout, weight_layout
from .ops.codes_linear import check_stored
from .ops.linear import call_linear
from .ops.registry import tile_layout

aten = torch.ops.aten


class HyperQuantTensor(TorchAOBaseTensor):
    """A weight `[N, K]`, or a stack of them `[E, N, K]` (the experts of a layer), stored as `qdata` words, or as the codes they stand for.

    Tensor attributes:
        qdata: `[N, tiles, words]` (stack: `[E, N, tiles, words]`) int32, see `hq_inductor.format.layout`. Its bits are all
            that is stored at `bps`. Of `packing="codes"`: `[N, tiles, tile]`, int8 or uint8, see `hq_inductor.format.codes`.
        codes_scale: None; of `packing="codes"`, `[N, tiles]` or `[N, 1]` int32.
        act_pre_scale: optional `[K]` bf16, multiplies activations; column i of the coded weight was divided by it.

    Non-tensor attributes:
        shape: logical shape, `(N, K)`, or `(K, N)` if `transposed`; `E` in front for a stack.
        bps: bits per scalar asked for; `bits_per_weight` is what is stored. Of codes: the rate that they were chosen for.
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
    optional_tensor_data_names = ["act_pre_scale", "codes_scale"]

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
        codes_scale: torch.Tensor | None = None,
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
        codes_scale: torch.Tensor | None = None,
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
        self.codes_scale = codes_scale

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
        check_values: bool = True,
        moments: torch.Tensor | None = None,
        packing: str = "rice",
    ) -> HyperQuantTensor:
        """Quantize a weight.

        Args:
            hp_tensor: `[N, K]` or `[E, N, K]`, floating point, finite.
            bps: bits per scalar, scales included: a multiple of 1/8 from 1.75 (e8; others 2) to 6.
            lattice: `"e8"`, `"d4"`, `"a2"` or `"z"`.
            tile: coefficients per tile, a multiple of 128; None chooses by K and rate (`choose_tile`).
            seed: selects the signs of the randomized Hadamard transform.
            act_pre_scale: `[K]`, positive; the weight is divided by it and activations are multiplied by it. Adds 16 bits per column.
            mma: number format of products with it: `"auto"`, `"int8"`, `"fp8"`, `"bf16"`, `"nvfp4"` or `"mxfp4"`.
            effort: 0 rounds to the nearest lattice point; 1 rounds by error and bits together, 0.1 to 0.5 dB better; 2 takes ten times as
                long for another 0.05 dB. The decoder's work is the same.
            check_values: refuse NaN, inf and values too large; False is for memory that has no values yet.
            moments: `[K, K]`, sum of `x x^T` over the layer's inputs, for a matrix only: coefficients make up for each other's rounding
                errors where inputs are correlated (`hq_inductor.format.feedback`).
            packing: `"rice"`, words at `bps`; or `"codes"`, the same weights as operands of the tensor cores, 8 bits each and scales:
                int8 codes, or e4m3 for `mma="fp8"`.

        Raises:
            TypeError: `hp_tensor` is not floating point.
            ValueError: `hp_tensor` is not 2-D or 3-D, is empty, has NaN, inf or values too large; or another argument is out of range;
                or `moments` has another shape, or is not positive semidefinite.

        Note: K that is not a multiple of the tile is padded with zero columns, which count in `bits_per_weight`.
        """
        if not hp_tensor.dtype.is_floating_point:
            raise TypeError(f"weight must be floating point, got {hp_tensor.dtype}")
        if hp_tensor.dim() == 3 and moments is not None:
            raise ValueError("moments must be None for a stack of matrices")
        if hp_tensor.dim() == 3 and hp_tensor.numel():
            flat = cls.from_hp(hp_tensor.flatten(0, 1), bps, lattice, tile, seed, act_pre_scale, mma, effort, check_values, None, packing)
            return flat.view(hp_tensor.shape)
        if hp_tensor.dim() != 2 or hp_tensor.numel() == 0:
            raise ValueError(f"weight must be a nonempty matrix [N, K], got shape {tuple(hp_tensor.shape)}")
        rows, columns = hp_tensor.shape
        check_mma(mma)
        check_packing(packing, mma)
        layout = weight_layout(columns, bps, lattice, tile)
        weight = hp_tensor.detach().to(torch.float32)
        if act_pre_scale is not None:
            if act_pre_scale.shape != (columns,):
                raise ValueError(f"act_pre_scale must have shape ({columns},), got {tuple(act_pre_scale.shape)}")
            act_pre_scale = act_pre_scale.detach().to(torch.bfloat16)
            weight = weight / act_pre_scale.to(torch.float32)
        if moments is not None:
            if moments.shape != (columns, columns):
                raise ValueError(f"moments must have shape ({columns}, {columns}), got {tuple(moments.shape)}")
            moments = moments.detach().to(weight.device, torch.float32)
            if act_pre_scale is not None:
                scale = act_pre_scale.to(torch.float32)
                moments = moments * scale * scale[:, None]
        if check_values:
            _check_values(weight)
        t = layout.tile
        codes, scale = _quantize(weight, layout, seed, effort, moments)
        if packing == "rice":
            parts = {"qdata": torch.ops.hyperquant.rice_encode(codes, scale, t.lattice, t.tile, t.code, t.words)}
        else:
            parts = dict(zip(("qdata", "codes_scale"), pack_codes(codes, scale, t, mma == "fp8"), strict=True))
        attributes = {"bps": float(bps), "lattice": lattice, "tile": t.tile, "code": t.code, "seed": seed, "mma": mma}
        return cls(**parts, shape=(rows, columns), dtype=hp_tensor.dtype, act_pre_scale=act_pre_scale, **attributes)

    @property
    def packing(self) -> str:
        """`"rice"` or `"codes"`."""
        return "rice" if self.codes_scale is None else "codes"

    def repack(self, packing: str, mma: str | None = None) -> HyperQuantTensor:
        """The same weight in the other packing; between words and int8 codes nothing is lost, either way.

        Args:
            packing: `"rice"` or `"codes"`.
            mma: number format of products from then on; None keeps it. With `"fp8"` codes become e4m3, and there is no way back.

        Raises:
            ValueError: an argument is out of range, or the weight is e4m3.
        """
        mma = self.mma if mma is None else mma
        check_mma(mma)
        check_packing(packing, mma)
        if self.qdata.dtype == torch.uint8:
            if packing == "codes" and mma == "fp8":
                return self._replace()
            raise ValueError("a weight in e4m3 has no lattice codes: repack the words that it was made from")
        t = weight_layout(self.in_features, self.bps, self.lattice, self.tile).tile
        stack = self.qdata.shape[:-2]
        if self.packing == "rice":
            codes, scale = torch.ops.hyperquant.rice_decode(self.qdata.flatten(0, -3), self.lattice, self.tile, self.code)
        else:
            codes, scale = self.qdata.flatten(0, -3).flatten(1), self.codes_scale.flatten(0, -2).view(torch.float32)
        if packing == "rice":
            qdata, scale = torch.ops.hyperquant.rice_encode(codes, scale, t.lattice, t.tile, t.code, t.words), None
        else:
            qdata, scale = pack_codes(codes, scale, t, mma == "fp8")
            scale = scale.unflatten(0, stack)
        return self._replace(qdata=qdata.unflatten(0, stack), codes_scale=scale, mma=mma)

    def __tensor_flatten__(self):
        # written out because torch 2.11 calls it for every parameter and step, and the generic one looks every list up again
        names = ["qdata"]
        if self.act_pre_scale is not None:
            names.append("act_pre_scale")
        if self.codes_scale is not None:
            names.append("codes_scale")
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
        return cls(tensors["qdata"], act_pre_scale=tensors.get("act_pre_scale"), codes_scale=tensors.get("codes_scale"), **attributes)

    def _stable_hash_for_caching(self) -> str:
        return repr((self.__tensor_flatten__(), tuple(self.qdata.shape), self.qdata.dtype))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            if func not in cls._ATEN_OP_TABLE[cls]:
                # below autograd, composite ops arrive whole
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            elif func.is_view and not args[0].is_inference():
                # a view of an ordinary tensor is one, whatever the mode
                with torch.inference_mode(False):
                    return super().__torch_dispatch__(func, types, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _replace(self, **changes) -> HyperQuantTensor:
        """A copy of the face with other tensors or attributes."""
        _, attributes = self.__tensor_flatten__()
        return type(self)(
            **{"qdata": self.qdata, "act_pre_scale": self.act_pre_scale, "codes_scale": self.codes_scale, **attributes, **changes}
        )

    @property
    def in_features(self) -> int:
        return self.shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        return self.shape[-1 if self.transposed else -2]

    @property
    def size_bytes(self) -> int:
        """Bytes stored: words or codes with their scales, and the column scales if there are any."""
        parts = (getattr(self, name) for name in self.__tensor_flatten__()[0])
        return sum(part.numel() * part.element_size() for part in parts)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight, scales and padding included."""
        return 8 * self.size_bytes / self.numel()

    def dequantize(self, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as a plain tensor, `self.shape`, in `output_dtype` (default: `self.dtype`)."""
        ops = torch.ops.hyperquant
        if self.packing == "rice":
            codes, scale = ops.rice_decode(self.qdata.flatten(0, -3), self.lattice, self.tile, self.code)
            rotated = ops.lattice_dequant(codes, scale, self.lattice, torch.float32)
        else:
            rotated = coefficients(self.qdata.flatten(0, -3), self.codes_scale.flatten(0, -2), self.lattice, torch.float32)
        weight = ops.hadamard(rotated, hadamard_block(self.tile), self.seed, True)[:, : self.in_features]
        if self.act_pre_scale is not None:
            weight = weight * self.act_pre_scale.to(torch.float32)
        weight = weight.to(output_dtype or self.dtype).unflatten(0, self.qdata.shape[:-2])
        return weight.mT if self.transposed else weight.contiguous()

    def __repr__(self, *, tensor_contents=None) -> str:
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, bps={self.bps:g}, lattice={self.lattice!r}, tile={self.tile}, "
            f"{'' if self.packing == 'rice' else 'packing=' + repr(self.packing) + ', '}"
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


def _quantize(
    weight: torch.Tensor, layout: WeightLayout, seed: int, effort: int, moments: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[N, padded K]` and scales of tiles."""
    ops, t = torch.ops.hyperquant, layout.tile
    block, padding = hadamard_block(t.tile), layout.padded_features - layout.in_features
    rotated = ops.hadamard(F.pad(weight, (0, padding)), block, seed, False)
    if moments is None:
        return ops.lattice_quantize(rotated, t.lattice, t.tile, t.code, t.words, layout.start_rms, effort)
    # both sides: R M R^T
    half = ops.hadamard(F.pad(moments, (0, padding, 0, padding)), block, seed, False)
    moments = ops.hadamard(half.t().contiguous(), block, seed, False)
    return quantize_with_feedback(rotated, moments, t, layout.start_rms, effort)


def linear(x: torch.Tensor, weight: HyperQuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` with a quantized weight: one `hyperquant::rice_linear` or `codes_linear` on its plain tensors."""
    if weight.transposed:
        raise NotImplementedError("linear with a transposed HyperQuantTensor is not supported; use weight.t() of it")
    if weight.dim() != 2:
        raise ValueError(f"weight of linear must be a matrix, got shape {tuple(weight.shape)}; select one of the stack")
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x must have {weight.in_features} features in its last dimension, got shape {tuple(x.shape)}")
    if weight.codes_scale is not None:
        return torch.ops.hyperquant.codes_linear(
            x, weight.qdata, weight.codes_scale, weight.act_pre_scale, bias, weight.lattice, weight.seed, weight.mma
        )
    return call_linear(x, weight.qdata, weight.act_pre_scale, bias, weight.lattice, weight.tile, weight.code, weight.seed, weight.mma)


def _per_row(weight: HyperQuantTensor, function, *args) -> dict[str, torch.Tensor]:
    """What `function(tensor, *args)` makes of the tensors that have the weight's rows."""
    parts = {"qdata": weight.qdata} if weight.codes_scale is None else {"qdata": weight.qdata, "codes_scale": weight.codes_scale}
    return {name: function(part, *args) for name, part in parts.items()}


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
    dims = {dim0 % weight.dim(), dim1 % weight.dim()}
    if len(dims) == 1:
        return weight._replace()
    if dims != {weight.dim() - 2, weight.dim() - 1}:
        raise NotImplementedError(f"a HyperQuantTensor transposes in its last two dimensions only, got {dim0} and {dim1}")
    *stack, n, k = weight.shape
    return weight._replace(shape=(*stack, k, n), transposed=not weight.transposed)


@implements([aten.view.default, aten._unsafe_view.default, aten.reshape.default])
def _(func, types, args, kwargs):
    weight, wanted = args
    wanted = tuple(wanted)
    if -1 in wanted:
        known = math.prod(size for size in wanted if size != -1)
        wanted = tuple(weight.numel() // known if size == -1 else size for size in wanted)
    # a flat view is what FSDP2 keeps of a shard: it is never read, so it may as well keep its shape
    if wanted == tuple(weight.shape) or wanted == (weight.numel(),):
        return weight._replace()
    if weight.transposed or len(wanted) not in (2, 3) or wanted[-1] != weight.shape[-1] or math.prod(wanted) != weight.numel():
        raise NotImplementedError(f"a HyperQuantTensor of shape {tuple(weight.shape)} cannot be viewed as {tuple(args[1])}")
    lead = weight.dim() - 1
    return weight._replace(**_per_row(weight, lambda part: part.reshape(*wanted[:-1], *part.shape[lead:])), shape=wanted)


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    weight = args[0]
    to = weight._get_to_kwargs(*args[1:], **kwargs)
    if not to["dtype"].is_floating_point:
        raise TypeError(f"a HyperQuantTensor can only be converted to a floating dtype, got {to['dtype']}")

    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(to["device"], non_blocking=to["non_blocking"], copy=True)

    return weight._replace(**_per_row(weight, move), act_pre_scale=move(weight.act_pre_scale), dtype=to["dtype"])


def _stored_dim(weight: HyperQuantTensor, dim: int) -> int:
    """The dimension of `qdata` that a dimension of the face runs along: rows before tiles, transposed or not."""
    last = weight.dim() - 1
    return 2 * last - 1 - dim if weight.transposed and dim >= last - 1 else dim


@implements(aten.slice.Tensor)
def _(func, types, args, kwargs):
    weight, dim, start, end, step = (*args, *(0, None, None, 1)[len(args) - 1 :])
    dim %= weight.dim()
    size = weight.shape[dim]
    start, end, _ = slice(start, end).indices(size)
    if step != 1:
        raise NotImplementedError(f"slices of a HyperQuantTensor need step 1, got {step}")
    shape = list(weight.shape)
    shape[dim] = max(0, end - start)
    stored = _stored_dim(weight, dim)
    if stored < weight.dim() - 1:
        return weight._replace(**_per_row(weight, aten.slice.Tensor, stored, start, end), shape=shape)
    if start % weight.tile or (end % weight.tile and end != size):
        raise ValueError(f"columns of a HyperQuantTensor slice at multiples of tile={weight.tile}, got {start}:{end}")
    tiles = (start // weight.tile, -(-end // weight.tile))
    column_scale, scale = weight.act_pre_scale, weight.codes_scale
    return weight._replace(
        qdata=aten.slice.Tensor(weight.qdata, stored, *tiles),
        act_pre_scale=None if column_scale is None else aten.slice.Tensor(column_scale, 0, start, end),
        codes_scale=aten.slice.Tensor(scale, stored, *tiles) if weight.qdata.dtype == torch.int8 else scale,
        shape=shape,
    )


def check_layout(weight: HyperQuantTensor) -> None:
    """Raise unless words or codes have the shape that the attributes say; for tensors that come from outside."""
    if weight.packing == "codes":
        _check_codes(weight)
        return
    layout = tile_layout(weight.lattice, weight.tile, weight.code, int(weight.qdata.shape[-1]))
    tiles = -(-weight.in_features // layout.tile)
    expected = (*weight.shape[:-2], weight.out_features, tiles)
    if tuple(weight.qdata.shape[:-1]) != expected:
        raise ValueError(
            f"qdata of a weight of shape {tuple(weight.shape)} must be [{', '.join(map(str, expected))}, {layout.words}], "
            f"got {tuple(weight.qdata.shape)}"
        )


def _check_codes(weight: HyperQuantTensor) -> None:
    layout = check_stored(weight.qdata.flatten(0, -3), weight.codes_scale.flatten(0, -2), weight.lattice)
    check_packing("codes", weight.mma)
    expected = (*weight.shape[:-2], weight.out_features, -(-weight.in_features // layout.tile), weight.tile)
    if tuple(weight.qdata.shape) != expected:
        raise ValueError(f"qdata of a weight of shape {tuple(weight.shape)} must be {expected}, got {tuple(weight.qdata.shape)}")
    if (weight.mma == "fp8") != (weight.qdata.dtype == torch.uint8):
        raise ValueError(f'mma must be "fp8" for e4m3 (uint8) and for nothing else, got {weight.mma!r} and {weight.qdata.dtype}')


@implements(aten.select.int)
def _(func, types, args, kwargs):
    weight, dim, index = args
    if weight.dim() != 3 or dim % 3 != 0:
        raise NotImplementedError(f"a HyperQuantTensor selects only a matrix of a stack, got dim {dim} of shape {tuple(weight.shape)}")
    return weight._replace(**_per_row(weight, lambda part: part.select(0, index)), shape=weight.shape[1:])


@implements(aten.bmm.default)
def _(func, types, args, kwargs):
    x, stack = args
    if not isinstance(stack, HyperQuantTensor) or not stack.transposed:
        raise NotImplementedError("a HyperQuantTensor can only be the right operand of bmm, and transposed: bmm(x, weight.mT)")
    return torch.stack([linear(x[i], _as_weight(aten.select.int(stack, 0, i))) for i in range(stack.shape[0])])


@implements(aten.unbind.int)
def _(func, types, args, kwargs):
    weight, dim = (*args, kwargs.get("dim", 0))[:2]
    return [aten.select.int(weight, dim, i) for i in range(weight.shape[dim])]


@implements(aten.split.Tensor)
def _(func, types, args, kwargs):
    weight, length, dim = (*args, kwargs.get("dim", 0))[:3]
    return [aten.slice.Tensor(weight, dim, start, start + length) for start in range(0, weight.shape[dim], length)]


@implements(aten.cat.default)
def _(func, types, args, kwargs):
    """Join along any dimension; column blocks must be whole tiles, and joined rows must have the same column scales."""
    weights, dim = (*args, kwargs.get("dim", 0))[:2]
    first = weights[0]
    dim %= first.dim()
    stored, columns = _stored_dim(first, dim), first.dim() - 1

    def attributes(weight: HyperQuantTensor) -> dict:
        others = {"shape": [size for d, size in enumerate(weight.shape) if d != dim], "stored as": weight.qdata.dtype}
        return {**weight.__tensor_flatten__()[1], **others}

    if not all(isinstance(weight, HyperQuantTensor) and attributes(weight) == attributes(first) for weight in weights):
        raise ValueError("HyperQuantTensors must agree in everything but the joined dimension to be concatenated")
    if stored == columns and any(weight.in_features % weight.tile for weight in weights[:-1]):
        raise ValueError(f"columns of HyperQuantTensors join at multiples of tile={first.tile}")
    scales = [weight.act_pre_scale for weight in weights if weight.act_pre_scale is not None]
    if len(scales) not in (0, len(weights)) or (stored != columns and not all(torch.equal(scale, scales[0]) for scale in scales)):
        raise ValueError("act_pre_scale must be the same in all HyperQuantTensors that are concatenated")
    column_scale = None if not scales else torch.cat(scales) if stored == columns else scales[0]
    scale = first.codes_scale
    if stored != columns or first.qdata.dtype == torch.int8:
        scale = None if scale is None else torch.cat([weight.codes_scale for weight in weights], stored)
    elif scale is not None and not all(torch.equal(weight.codes_scale, scale) for weight in weights):
        raise ValueError("columns of HyperQuantTensors in e4m3 join only where the scales of their rows agree")
    shape = list(first.shape)
    shape[dim] = sum(weight.shape[dim] for weight in weights)
    qdata = torch.cat([weight.qdata for weight in weights], stored)
    return first._replace(qdata=qdata, codes_scale=scale, act_pre_scale=column_scale, shape=shape)


@implements(aten.new_zeros.default)
def _(func, types, args, kwargs):
    """Room for a shard of rows (FSDP2): zero words, the same attributes."""
    weight, size = args
    size = tuple(size)
    if weight.transposed or len(size) != weight.dim() or size[1:] != tuple(weight.shape[1:]):
        raise NotImplementedError(f"new_zeros of a HyperQuantTensor keeps all but the first of {tuple(weight.shape)}, got {size}")
    return weight._replace(**_per_row(weight, lambda part: part.new_zeros((size[0], *part.shape[1:]))), shape=size)


@implements(aten.as_strided.default)
def _(func, types, args, kwargs):
    weight, size, stride = args[:3]
    if tuple(size) != tuple(weight.shape) or tuple(stride) != weight.stride():
        raise NotImplementedError(f"as_strided of a HyperQuantTensor must keep shape {tuple(weight.shape)}, got {tuple(size)}")
    return weight._replace()


def _pre_all_gather(self, mesh, outer_size=None, outer_stride=None, module=None, mp_policy=None):
    """FSDP2: what to gather, the words of a shard of rows. Column scales are whole on every rank."""
    if outer_size is not None and outer_size[0] % mesh.size():
        raise ValueError(f"rows of a HyperQuantTensor must divide by {mesh.size()} ranks for FSDP2, got {outer_size[0]}")
    return tuple(_per_row(self, lambda part: part).values()), None


def _post_all_gather(self, all_gather_outputs, metadata, param_dtype, *, out=None):
    """FSDP2: the whole weight from gathered words. `out` already shares their memory."""
    if out is not None:
        return None
    parts = dict(zip(("qdata", "codes_scale"), all_gather_outputs, strict=False))
    return self._replace(**parts, shape=(parts["qdata"].shape[0], *self.shape[1:]), dtype=param_dtype), all_gather_outputs


HyperQuantTensor.fsdp_pre_all_gather = _pre_all_gather
HyperQuantTensor.fsdp_post_all_gather = _post_all_gather

HyperQuantTensor.__module__ = "hq_inductor"
# lets torch.load(weights_only=True) read state dicts
torch.serialization.add_safe_globals([HyperQuantTensor])
