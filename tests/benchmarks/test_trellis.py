"""The trellis coder finds the best path there is, and codes as its sources say trellises do."""

import itertools

import pytest
import torch
from peers import shannon_snr_db, snr_db
from trellis import codebook, trellis_path, trellis_quantize


@pytest.mark.parametrize(("bits", "state_bits", "length"), [(1, 1, 6), (1, 3, 7), (2, 4, 4), (3, 3, 3)])
def test_path_is_the_best_of_all(bits, state_bits, length):
    values = codebook(bits, state_bits)
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(length))
    best = torch.full((3,), torch.inf)
    for first in range(1 << state_bits):
        for shifted in itertools.product(range(1 << bits), repeat=length - 1):
            states = [first]
            for new in shifted:
                states.append((states[-1] << bits | new) % (1 << state_bits))
            best = torch.minimum(best, (x - values[states]).square().sum(1))
    torch.testing.assert_close((x - trellis_path(x, values, bits)).square().sum(1), best)


def test_memory_gains():
    """More states, less error; between scalar quantization (Lloyd-Max, 9.30 dB) and Shannon's bound."""
    x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(2))
    snr = []
    for state_bits in (4, 7, 10):
        found, rate = trellis_quantize(x, 2, state_bits)
        assert rate == 2 + (state_bits - 2 + 16) / 1024
        snr.append(snr_db(x, found))
    assert snr == sorted(snr) and 10.9 < snr[-1] < shannon_snr_db(2)
