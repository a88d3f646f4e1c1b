import pytest
import torch

from hq_inductor.format.counter import mix, uniform
from hq_inductor.format.hadamard import hadamard_ref
from hq_inductor.format.rotation import ROTATIONS, role_seed, rotation_matrix


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_rotations_are_orthogonal(rotation, head_dim):
    matrix = rotation_matrix(rotation, head_dim, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(head_dim, dtype=torch.float64), atol=1e-12)


def test_hadamard_is_the_transform_of_rows():
    x = torch.randn(5, 96)
    expected = hadamard_ref(x, 32, role_seed(7, 3, "v"))
    assert torch.allclose(x @ rotation_matrix("hadamard", 96, 7, 3, "v"), expected, atol=1e-5)


def test_haar_is_uniform():
    """Moments of Haar matrices: E q^2 = 1/n, E q^4 = 3 / (n (n + 2)), E trace = 0 (negative without the signs), E trace^2 = 1."""
    n, count = 16, 400
    q = torch.stack([rotation_matrix("haar", n, seed, dtype=torch.float64) for seed in range(count)])
    assert q.square().mean().item() == pytest.approx(1 / n)
    assert q.pow(4).mean().item() == pytest.approx(3 / (n * (n + 2)), rel=0.02)
    trace = q.diagonal(dim1=1, dim2=2).sum(-1)
    assert abs(trace.mean().item()) < 4 / count**0.5 and trace.square().mean().item() == pytest.approx(1, abs=0.3)


def test_layers_and_roles_differ():
    seeds = {role_seed(seed, layer, role) for seed in range(3) for layer in range(40) for role in "kv"}
    assert len(seeds) == 240 and all(0 <= seed < 2**31 for seed in seeds)
    assert not torch.equal(rotation_matrix("haar", 64, layer=0), rotation_matrix("haar", 64, layer=1))
    with pytest.raises(ValueError, match="role must be 'k' or 'v', got 'q'"):
        role_seed(0, 0, "q")
    with pytest.raises(ValueError, match="rotation must be one of haar, hadamard, none, got 'qjl'"):
        rotation_matrix("qjl", 64)


def test_hash_of_tensors_is_that_of_integers():
    counters = torch.tensor([0, 1, 2**31, 123456789, 2**40 + 5])
    assert mix(3, counters).tolist() == [mix(3, int(c)) for c in counters]
    u = uniform(1, torch.arange(100)[:, None], torch.arange(1000))
    assert u.shape == (100, 1000) and 0 <= u.min() and u.max() < 1
    # each decile of 100,000 draws, within five standard errors
    counts = torch.histc(u.flatten(), 10, 0, 1)
    assert (counts - 10000).abs().max() < 5 * (10000 * 0.9) ** 0.5
    assert abs(torch.corrcoef(torch.stack((u[:, :-1].flatten(), u[:, 1:].flatten())))[0, 1]) < 0.02
