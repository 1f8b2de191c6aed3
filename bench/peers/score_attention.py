"""What people write today to score keys: softmax over materialised scores, then the reduction; and SnapKV's way of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Peer


def _attention(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """(B, H, R, N): keys repeated for grouped heads, scores, mask and softmax in the dtype of the model."""
    batch, heads, rows, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if groups != heads:
        key = key[:, :, None].expand(batch, groups, heads // groups, keys, dim).reshape(batch, heads, keys, dim)
    scores = query @ key.transpose(2, 3) * dim**-0.5
    if causal:
        position = torch.arange(keys - rows, keys, device=query.device)
        scores = scores + torch.where(torch.arange(keys, device=query.device) <= position[:, None], 0.0, -torch.inf).to(scores.dtype)
    return scores.softmax(-1)


def eager(
    query: Tensor, key: Tensor, causal: bool = False, columns: tuple[int, int] | None = None, reduce: Any = ("sum",),
    heads: str = "mean", pool: int = 1,
) -> Any:  # fmt: skip
    """Attention of the chosen rows, mean over heads, sum and maximum over rows: MustDrop's dual attention, the class token's row."""
    if heads != "mean" or pool != 1:
        return NotImplemented
    first, end = columns or (0, key.shape[2])
    attention = _attention(query, key, causal)[..., first:end].mean(1)
    return [{"sum": attention.sum, "max": attention.amax}[name](1).float() for name in reduce]


def snapkv(
    query: Tensor, key: Tensor, causal: bool = False, columns: tuple[int, int] | None = None, reduce: Any = ("sum",),
    heads: str = "mean", pool: int = 1,
) -> Any:  # fmt: skip
    """SnapKV's window score: repeated keys, a dense mask, softmax in float32, mean over rows, average pooling, mean over the group."""
    batch, query_heads, rows, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if heads != "group" or not causal or columns != (0, keys - rows):
        return NotImplemented
    repeated = key[:, :, None].expand(batch, groups, query_heads // groups, keys, dim).reshape(batch, query_heads, keys, dim)
    scores = query @ repeated.transpose(2, 3) / dim**0.5
    mask = torch.full_like(scores, -torch.inf).triu(keys - rows + 1)
    attention = (scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype)
    score = F.avg_pool1d(attention[..., :-rows].mean(2), pool, 1, pool // 2)
    return [score.view(batch, groups, query_heads // groups, keys - rows).mean(2)]


def _close_enough(got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]) -> None:
    """The same scores up to the rounding of the model's dtype, and up to a factor where a mean over rows stands for the sum."""
    for g, w in zip(got, want, strict=True):
        g, w = g.double(), w.double()
        eps = torch.finfo(kwargs["query"].dtype).eps
        error = (g * (w.sum() / g.sum()) - w).abs().max() / w.abs().max()
        assert error < 64 * eps, f"error {error:.3g} of the largest score"


PEERS = {
    "softmax(QKᵀ), reduce": Peer(eager, compiled=True, compare=_close_enough, gradient=False),
    "SnapKV formula": Peer(snapkv, compiled=True, compare=_close_enough, gradient=False),
}
