import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from hq_inductor import HyperQuantTensor
from hq_inductor.format.layout import LATTICES


def snr_db(reference, value):
    reference = reference.double()
    return -10 * torch.log10((reference - value.double()).square().sum() / reference.square().sum()).item()


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("bps", [2, 2.125, 3, 4, 4.875, 6])
@pytest.mark.parametrize("shape", [(4, 512), (3, 2048), (64, 768), (7, 14336)])
def test_exact_rate(lattice, bps, shape):
    weight = HyperQuantTensor.from_hp(torch.randn(shape), bps=bps, lattice=lattice)
    assert 8 * weight.qdata.numel() * weight.qdata.element_size() == bps * shape[0] * shape[1]
    assert weight.bits_per_weight == bps


def test_rate_with_padding_and_part_words():
    weight = HyperQuantTensor.from_hp(torch.randn(8, 500), bps=4)
    assert weight.shape == (8, 500) and weight.qdata.shape == (8, 1, 64)
    assert weight.bits_per_weight == 4 * 512 / 500
    # 384 coefficients at 4 1/8 bits are 49.5 words: rounded down
    assert HyperQuantTensor.from_hp(torch.randn(8, 384), bps=4.125).bits_per_weight == 32 * 49 / 384


def test_act_pre_scale_counts():
    weight = HyperQuantTensor.from_hp(torch.randn(64, 512), act_pre_scale=torch.full((512,), 0.5))
    assert weight.bits_per_weight == 4 + 16 / 64


@pytest.mark.parametrize(("bps", "floor_db"), [(6, 34), (4, 21.9), (3, 15.9), (2, 9.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize(bps, floor_db, dtype):
    hp = (torch.randn(32, 1024) * 0.02).to(dtype)
    weight = HyperQuantTensor.from_hp(hp, bps=bps)
    out = weight.dequantize()
    assert out.dtype == weight.dtype == dtype and out.shape == hp.shape and out.is_contiguous()
    assert weight.dequantize(torch.float64).dtype == torch.float64
    assert snr_db(hp, out) > floor_db


def test_seed_changes_words_not_quality():
    hp = torch.randn(32, 512)
    a, b = (HyperQuantTensor.from_hp(hp, seed=seed) for seed in (0, 1))
    assert not torch.equal(a.qdata, b.qdata)
    assert torch.equal(a.qdata, HyperQuantTensor.from_hp(hp, seed=0).qdata)
    assert abs(snr_db(hp, a.dequantize()) - snr_db(hp, b.dequantize())) < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3)])
def test_linear(dtype, bias, lead):
    hp = torch.randn(24, 512)
    weight = HyperQuantTensor.from_hp(hp.to(dtype))
    x, b = torch.randn(*lead, 512).to(dtype), torch.randn(24).to(dtype) if bias else None
    exact = F.linear(x.double(), weight.dequantize(torch.float64), None if b is None else b.double())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = F.linear(x, weight, b)
        assert out.dtype == dtype and out.shape == (*lead, 24)
        # fp32 accumulation of 512 products, then one rounding to the output dtype
        error = (out.double() - exact).norm() / exact.norm()
        assert error < torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    with torch.inference_mode():
        torch.testing.assert_close(torch.ops.aten.linear.default(x, weight, b), out)


def test_products_with_the_transpose():
    weight = HyperQuantTensor.from_hp(torch.randn(24, 512))
    x, bias = torch.randn(6, 512), torch.randn(24)
    expected = F.linear(x, weight)
    assert weight.t().shape == (512, 24) and weight.mT.shape == (512, 24)
    assert weight.t().t().shape == weight.shape
    assert torch.equal(weight.t().dequantize(), weight.dequantize().t())
    for product in (x @ weight.t(), torch.mm(x, weight.t()), x @ weight.transpose(0, 1)):
        assert torch.equal(product, expected)
    torch.testing.assert_close(torch.addmm(bias, x, weight.t()), expected + bias)
    with pytest.raises(NotImplementedError, match="right operand"):
        x.t() @ weight
    with pytest.raises(NotImplementedError, match="beta=1"):
        torch.addmm(bias, x, weight.t(), alpha=2)


@pytest.mark.parametrize("scaled", [False, True])
def test_slices_equal_slices_of_the_dense_weight(scaled):
    hp = torch.randn(20, 1024)
    scale = torch.rand(1024) + 0.5 if scaled else None
    weight = HyperQuantTensor.from_hp(hp, tile=256, act_pre_scale=scale)
    dense = weight.dequantize()
    assert torch.equal(weight[3:11].dequantize(), dense[3:11])
    assert torch.equal(weight.narrow(0, 5, 1).dequantize(), dense[5:6])
    assert torch.equal(weight[:, 256:768].dequantize(), dense[:, 256:768])
    assert torch.equal(weight.narrow(1, 512, 512).dequantize(), dense[:, 512:])
    assert torch.equal(weight[2:4, -256:].dequantize(), dense[2:4, -256:])
    assert torch.equal(weight.t()[256:512].dequantize(), dense.t()[256:512])
    assert weight[20:].shape == (0, 1024)
    # slices are views: writing through them is how sharded loaders fill a weight
    assert weight.narrow(0, 4, 8).qdata.data_ptr() == weight.qdata[4:].data_ptr()
    with pytest.raises(ValueError, match=r"multiples of tile=256, got 100:356"):
        weight[:, 100:356]
    with pytest.raises(NotImplementedError, match="step 1"):
        weight[::2]


def test_slice_of_padded_columns():
    weight = HyperQuantTensor.from_hp(torch.randn(4, 500), tile=128)
    assert torch.equal(weight[:, 384:].dequantize(), weight.dequantize()[:, 384:])
    assert weight[:, 384:].shape == (4, 116)


def test_copy_through_narrow():
    a, b = (HyperQuantTensor.from_hp(torch.randn(16, 512)) for _ in range(2))
    a.narrow(0, 4, 8).copy_(b.narrow(0, 8, 8))
    assert torch.equal(a.dequantize()[4:12], b.dequantize()[8:])
    a.copy_(b)
    assert torch.equal(a.dequantize(), b.dequantize())
    with pytest.raises(ValueError, match="metadata mismatch"):
        a.copy_(HyperQuantTensor.from_hp(torch.randn(16, 512), bps=3))


def test_detach_clone_deepcopy():
    weight = HyperQuantTensor.from_hp(torch.randn(8, 512), act_pre_scale=torch.ones(512))
    for other in (weight.clone(), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.contiguous()):
        assert isinstance(other, HyperQuantTensor) and torch.equal(other.dequantize(), weight.dequantize())
    assert weight.clone().qdata.data_ptr() != weight.qdata.data_ptr()
    assert weight.detach().qdata.data_ptr() == weight.qdata.data_ptr()


def test_to_dtype_and_device():
    weight = HyperQuantTensor.from_hp(torch.randn(8, 512))
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    assert weight.half().dequantize().dtype == torch.float16
    assert weight.to("cpu", torch.float16).dtype == torch.float16
    assert torch.equal(weight.bfloat16().qdata, weight.qdata)
    assert weight.to("meta").device.type == "meta"
    with pytest.raises(TypeError, match=r"floating dtype, got torch.int8"):
        weight.to(torch.int8)


def test_save_and_load_weights_only():
    weight = HyperQuantTensor.from_hp(torch.randn(8, 512), bps=3.5, lattice="d4", act_pre_scale=torch.ones(512))
    file = io.BytesIO()
    torch.save({"w": weight}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["w"]
    assert torch.equal(loaded.qdata, weight.qdata) and torch.equal(loaded.dequantize(), weight.dequantize())
    assert loaded.__tensor_flatten__() == weight.__tensor_flatten__()


def test_other_format_version_is_refused():
    weight = HyperQuantTensor.from_hp(torch.randn(8, 512))
    with pytest.raises(ValueError, match="format_version must be 3, got 1"):
        weight._replace(format_version=1)


def test_repr_does_not_dump_data():
    text = repr(HyperQuantTensor.from_hp(torch.randn(64, 512)))
    assert text == (
        "HyperQuantTensor(shape=(64, 512), bps=4, lattice='e8', tile=512, bytes=16384, "
        "bits_per_weight=4, dtype=torch.float32, device='cpu')"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused(value):
    hp = torch.randn(4, 512)
    hp[1, 7] = value
    with pytest.raises(ValueError, match="weight must be finite, got NaN or inf"):
        HyperQuantTensor.from_hp(hp)


@pytest.mark.parametrize("bps", [2, 4, 6])
def test_extreme_weights(bps):
    hp = torch.randn(4, 512)
    hp[0] = 0
    hp[1, 100] = 1e6
    hp[2] *= 1e-42
    out = HyperQuantTensor.from_hp(hp, bps=bps).dequantize()
    assert out.isfinite().all() and (out[0] == 0).all() and (out[2] == 0).all()
    assert (out[1] - hp[1]).norm() < 0.35 * hp[1].norm()
    # an outlier in one row does not touch the others
    assert snr_db(hp[3], out[3]) > 9
    with pytest.raises(ValueError, match="values must be at most"):
        HyperQuantTensor.from_hp(torch.full((4, 512), 1e30))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hp_tensor": torch.ones(4, 512, dtype=torch.int32)}, TypeError, "weight must be floating point, got torch.int32"),
        ({"hp_tensor": torch.ones(512)}, ValueError, r"matrix \[N, K\], got shape \(512,\)"),
        ({"hp_tensor": torch.ones(0, 512)}, ValueError, "nonempty"),
        ({"bps": 7.3}, ValueError, "multiple of 1/8 from 1.75 to 6.0 for lattice 'e8', got 7.3"),
        ({"bps": 1.75, "lattice": "z"}, ValueError, "from 2.0 to 6.0 for lattice 'z', got 1.75"),
        ({"lattice": "e9"}, ValueError, "lattice must be one of 'e8', 'd4', 'a2', 'z', got 'e9'"),
        ({"tile": 100}, ValueError, "tile must be None or a multiple of 128 from 128 to 1536, got 100"),
        ({"act_pre_scale": torch.ones(3)}, ValueError, r"act_pre_scale must have shape \(512,\), got \(3,\)"),
    ],
)
def test_from_hp_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        HyperQuantTensor.from_hp(**{"hp_tensor": torch.randn(4, 512), **arguments})


def test_linear_refuses_wrong_features():
    with pytest.raises(ValueError, match=r"x must have 500 features .* got shape \(2, 512\)"):
        F.linear(torch.randn(2, 512), HyperQuantTensor.from_hp(torch.randn(4, 500)))


def test_unsupported_operation_is_named():
    with pytest.raises(NotImplementedError, match=r"aten\.cos"):
        torch.cos(HyperQuantTensor.from_hp(torch.randn(4, 512)))


VIEWS = {
    "t": lambda w, s, x: w.t(),
    "transpose": lambda w, s, x: s.transpose(1, 2),
    "mT": lambda w, s, x: s.mT,
    "select": lambda w, s, x: s[1],
    "unbind": lambda w, s, x: list(s)[2],
    "rows": lambda w, s, x: w[8:16],
    "columns": lambda w, s, x: w[:, 256:],
    "narrow": lambda w, s, x: w.narrow(0, 8, 16),
    "chunk": lambda w, s, x: w.chunk(2, dim=1)[1],
    "split": lambda w, s, x: w.split(16)[1],
    "view": lambda w, s, x: s.view(-1, 512),
    "unflatten": lambda w, s, x: w.unflatten(0, (2, 16)),
    "detach": lambda w, s, x: w.detach(),
    "product": lambda w, s, x: x[0] @ w.t(),
    "batched product": lambda w, s, x: torch.bmm(x, s.mT),
    "linear of one": lambda w, s, x: F.linear(x[0], s[0]),
}


@pytest.mark.parametrize("loaded", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", VIEWS.values(), ids=VIEWS.keys())
def test_views_in_inference_mode(function, loaded):
    """Whether the weight was made inside of the mode or outside."""
    torch.manual_seed(0)
    w, s, x = torch.randn(32, 512), torch.randn(3, 32, 512), torch.randn(3, 5, 512)

    def weights():
        return HyperQuantTensor.from_hp(w, tile=256), HyperQuantTensor.from_hp(s, tile=256)

    expected = function(*weights(), x)
    with loaded():
        packed = weights()
    with torch.inference_mode():
        found = function(*packed, x)
        if isinstance(found, HyperQuantTensor):
            assert found.shape == expected.shape and found.qdata.untyped_storage().data_ptr() in {t.qdata.data_ptr() for t in packed}
            found, expected = found.dequantize(), expected.dequantize()
        assert torch.equal(found, expected)
