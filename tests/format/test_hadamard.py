import pytest
import torch

from hq_inductor.format.hadamard import hadamard_block, hadamard_ref, rht_signs


def sylvester(n):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return h


@pytest.mark.parametrize("block", [1, 2, 8, 128, 512])
@pytest.mark.parametrize("seed", [0, 3])
def test_hadamard_is_the_signed_sylvester_matrix(block, seed):
    x = torch.randn(3, 2 * block, dtype=torch.float64)
    matrix = sylvester(block) * rht_signs(block, seed, dtype=torch.float64) / block**0.5
    expected = (x.view(3, 2, block) @ matrix.t()).view(3, -1)
    torch.testing.assert_close(hadamard_ref(x, block, seed), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inverse(dtype):
    x = torch.randn(5, 3, 384).to(dtype)
    back = hadamard_ref(hadamard_ref(x.float(), 128, 9), 128, 9, inverse=True).to(dtype)
    torch.testing.assert_close(back, x)


def test_signs_are_balanced_and_depend_on_the_seed():
    signs = torch.stack([rht_signs(512, seed) for seed in range(200)])
    assert (signs.abs() == 1).all()
    assert signs.mean().abs() < 5 / (200 * 512) ** 0.5
    correlation = signs @ signs.t() / 512 - torch.eye(200)
    assert correlation.abs().max() < 0.3


def test_makes_a_spike_flat():
    x = torch.zeros(512)
    x[100] = 1.0
    torch.testing.assert_close(hadamard_ref(x, 512).abs(), torch.full((512,), 512**-0.5))


@pytest.mark.parametrize(("tile", "block"), [(128, 128), (384, 128), (512, 512), (1024, 512), (768, 256), (1408, 128)])
def test_hadamard_block(tile, block):
    assert hadamard_block(tile) == block


def test_refuses():
    with pytest.raises(ValueError, match="power of two, got 96"):
        hadamard_ref(torch.randn(96), 96)
    with pytest.raises(ValueError, match="multiple of block=128, got 100"):
        hadamard_ref(torch.randn(100), 128)
