"""The search among codes as the ops of vector quantisation share it: reference, and measure."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CENTRE_CODES = 64
CHUNK = 4096
"""Rows compared at a time: the matrix of distances of all of them may not fit."""


def normalize(x: Tensor) -> Tensor:
    """Vectors of length 1; zero stays zero."""
    return F.normalize(x, dim=-1, eps=1e-12)


def centre_of(codebook: Tensor) -> Tensor:
    """The mean of evenly spaced codes, of those among them that are finite."""
    count = min(CENTRE_CODES, codebook.shape[0])
    spaced = codebook[torch.arange(count, device=codebook.device) * codebook.shape[0] // count]
    return spaced[spaced.isfinite().all(-1)].mean(0).nan_to_num(0)


def nearest(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The index (N) of the nearest code of every row; x (N, D), codebook (K, D), wide."""
    usable = codebook.isfinite().all(-1)
    whole = x.isfinite().all(-1)
    if metric == "l2":
        centre = centre_of(codebook)
        x, codebook = x - centre, codebook - centre
    elif metric == "cosine":
        x, codebook = normalize(x), normalize(codebook)
    codebook = torch.where(usable[:, None], codebook, 0)
    bias = codebook.square().sum(-1) / 2 if metric == "l2" else 0
    found = []
    for part in x.split(CHUNK):
        scores = part @ codebook.T - bias
        found.append(scores.masked_fill(~usable, -torch.inf).argmax(-1))
    return torch.where(whole, torch.cat(found), 0)


def near_enough(
    x: Tensor, codebook: Tensor, got: Tensor, want: Tensor, metric: str, slack: Tensor | None = None
) -> None:
    """Raises where an index is neither that of float64 nor within rounding of it.

    x (N, D) and codebook (K, D) in float64; got, want and slack (N): squared distances that much
    farther off are right too, beyond the 1e-6 that every search is allowed.
    """
    other = (got != want).nonzero()[:, 0]
    x, ours, theirs = x[other], codebook[got[other]], codebook[want[other]]
    assert not (ours == theirs).all(-1).any(), "of equal codes not the first"
    if metric == "cosine":
        x, ours, theirs = normalize(x), normalize(ours), normalize(theirs)
    if metric == "l2":
        gap = (x - ours).square().sum(-1) - (x - theirs).square().sum(-1)
        centre = codebook[codebook.isfinite().all(-1)].mean(0)
        x, theirs = x - centre, theirs - centre
    else:
        gap = 2 * (x * (theirs - ours)).sum(-1)
    allowed = 1e-6 * (x.square().sum(-1) + theirs.square().sum(-1))
    wrong = ~(gap <= allowed + (0 if slack is None else slack[other]))
    assert not wrong.any(), f"rows {other[wrong][:4].tolist()}: there is a nearer code"
