"""What people write today to keep the k best tokens: topk, sort, gather; and the honest baseline,
index_select on flat rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Peer


def _indices(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k, dim=1).indices.sort(dim=1).values


def chain(x: Tensor, scores: Tensor, k: int) -> list[Tensor]:
    """topk, sort, gather with an index expanded over the channels, as pruning code does it."""
    return [x.gather(1, _indices(scores, k)[..., None].expand(-1, -1, x.shape[2]))]


def flat(x: Tensor, scores: Tensor, k: int) -> list[Tensor]:
    """topk, sort, index_select on the rows of all images laid flat."""
    batch, tokens, channels = x.shape
    rows = _indices(scores, k) + torch.arange(batch, device=x.device)[:, None] * tokens
    return [x.reshape(-1, channels).index_select(0, rows.reshape(-1)).view(batch, k, channels)]


def _but_for_ties(
    got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]
) -> None:
    """torch.topk breaks ties as it likes: nine in ten rows are the reference's."""
    assert got[0].shape == want[0].shape
    direction = torch.linspace(0.5, 1.5, got[0].shape[-1]).to(want[0].device, torch.float64)
    for ours, theirs in zip(want[0].double() @ direction, got[0].double() @ direction, strict=True):
        right = torch.isin(theirs, ours).double().mean().item()
        assert right >= 0.9, f"{right:.0%} of the rows are those of the reference"


def _gradients_but_for_ties(
    got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]
) -> None:
    """Nine in ten rows are chosen or not as in the reference; every image got the same in all."""
    chosen, wanted = got[0].ne(0).any(-1), want[0].ne(0).any(-1)
    right = (chosen == wanted).double().mean().item()
    assert right >= 0.9, f"{right:.0%} of the rows are chosen as in the reference"
    assert torch.allclose(got[0].double().sum(1), want[0].double().sum(1), atol=1e-3)


HELD: dict[str, Any] = {
    "compare": _but_for_ties,
    "compare_gradients": _gradients_but_for_ties,
    "compiled": True,
}
PEERS = {
    "topk, sort, gather": Peer(chain, **HELD),
    "topk, sort, flat index_select": Peer(flat, **HELD),
}
