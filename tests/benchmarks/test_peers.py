"""The peers reproduce the figures that their sources print, so that a comparison with them means something."""

import math

import pytest
import torch
from peers import PEERS, lloyd_max_levels, nf4_levels, shannon_snr_db, snr_db


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(256, 2048, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("peer", [p for p in PEERS if p.published_snr_db is not None], ids=lambda p: p.name)
def test_snr_agrees_with_published_figures(peer, gaussian):
    # 0.15 dB: sampling (0.01), rounding of the published figures, and a row scale that adapts to the row
    assert abs(snr_db(gaussian, peer.quantize(gaussian)) - peer.published_snr_db) < 0.15


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.name)
def test_snr_stays_below_shannon_and_follows_scale(peer, gaussian):
    snr = snr_db(gaussian[:32], peer.quantize(gaussian[:32]))
    assert snr < shannon_snr_db(peer.bits_per_weight(2048))
    # 8 is a power of two, so every format with floating scales has the same codes
    torch.testing.assert_close(peer.quantize(8 * gaussian[:32]), 8 * peer.quantize(gaussian[:32]), rtol=1e-5, atol=1e-5)


def test_lloyd_max_levels_of_one_and_two_bits():
    """Max 1960, table I, and the closed form of one bit."""
    torch.testing.assert_close(lloyd_max_levels(2), torch.tensor([-1.0, 1.0]) * math.sqrt(2 / math.pi))
    torch.testing.assert_close(lloyd_max_levels(4), torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), rtol=0, atol=5e-4)


def test_nf4_levels():
    """QLoRA, appendix E, to the digits that float32 quantiles give."""
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    torch.testing.assert_close(nf4_levels(), torch.tensor(published), rtol=0, atol=2e-5)


def test_rates():
    rates = {peer.name: peer.bits_per_weight(1024) for peer in PEERS}
    assert (rates["NF4 g64"], rates["int4 g128"], rates["int3 g128"], rates["nvfp4"], rates["mxfp4"]) == (4.25, 4.25, 3.25, 4.5, 4.25)
    assert rates["HIGGS p=2 n=256"] == rates["Lloyd-Max 16"] == 4 + 16 / 1024
