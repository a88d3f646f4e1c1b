"""Trellis coding of a Gaussian source: what a code of long memory reaches at a fixed rate, at the price of a search over all states.

Definition.  A state is the last L bits of the code; a step shifts `bits` new ones in, and its value is a random codebook's entry of the
             new state, N(0, 1 - 2^(-2 bits)), the marginal of the best reproduction. The encoder takes the path of least squared error
             (Viterbi).
Rate.        A row of K values takes `L + bits (K - 1)` bits, and 16 for its scale.
Source.      The bitshift trellis of QTIP, arXiv 2406.11235, with a random codebook (as Mao and Gray, Rate-constrained simulation
             and source coding iid sources, 2010) in place of the computed ones that make decoding fast.
"""

from __future__ import annotations

import torch
from tqdm import tqdm


def codebook(bits: int, state_bits: int) -> torch.Tensor:
    """Value of every state, `[2^state_bits]` fp32, always the same."""
    values = torch.randn(1 << state_bits, generator=torch.Generator().manual_seed(0))
    return values * (1 - 4.0**-bits) ** 0.5


def trellis_path(x: torch.Tensor, values: torch.Tensor, bits: int, progress: bool = False) -> torch.Tensor:
    """Values of the path of least squared error.

    Args:
        x: `[B, K]` fp32.
        values: of the states, `[2^L]`, L at least `bits`.
        bits: that a step shifts in.

    Returns:
        `[B, K]`, each path's values.
    """
    states, branches = len(values), 1 << bits
    kept = states // branches  # what is left of a state when `bits` have been shifted out
    rows = torch.arange(len(x))
    cost = (x[:, :1] - values).square()
    choices = []
    for k in tqdm(range(1, x.shape[1]), desc=f"trellis, {bits} bits", disable=not progress, leave=False):
        # states that differ only in the bits shifted out lead to the same ones
        best, oldest = cost.view(-1, branches, kept).min(1)
        choices.append(oldest.to(torch.uint8))
        cost = (best[:, :, None] + (x[:, k, None, None] - values.view(kept, branches)).square()).flatten(1)
    state = cost.argmin(1)
    path = [values[state]]
    for oldest in reversed(choices):
        rest = state // branches
        state = oldest[rows, rest].long() * kept + rest
        path.append(values[state])
    return torch.stack(path[::-1], 1)


def trellis_quantize(x: torch.Tensor, bits: int, state_bits: int, progress: bool = False) -> tuple[torch.Tensor, float]:
    """Rows `[B, K]` as a decoder gets them, scaled by their root mean squares in fp16, and bits per value."""
    scale = x.square().mean(-1, keepdim=True).sqrt().half().float()
    found = trellis_path(x / scale, codebook(bits, state_bits), bits, progress) * scale
    columns = x.shape[1]
    return found, (state_bits + bits * (columns - 1) + 16) / columns
