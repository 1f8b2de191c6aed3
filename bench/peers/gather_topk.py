"""What people write today to keep the k best tokens: topk, sort, gather; and the honest baseline, index_select on flat rows."""

from __future__ import annotations

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


def _close_enough(
    got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, object]
) -> None:
    """torch.topk breaks ties as it likes: every row must be a row of x, and most must be the right one."""
    assert got[0].shape == want[0].shape
    right = (got[0].double() == want[0]).all(-1).double().mean().item()
    assert right > 0.5, f"{right:.0%} of the rows are those of the reference"


PEERS = {
    "topk, sort, gather": Peer(chain, compiled=True, compare=_close_enough),
    "topk, sort, flat index_select": Peer(flat, compiled=True, compare=_close_enough),
}
