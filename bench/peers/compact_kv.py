"""What people write today to compact a key/value cache: kvpress's gather, and index_select."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Peer


def gather(layers: Any, index: Tensor, **_: Any) -> list[Tensor]:
    """kvpress: the index expanded over the channels, one gather per tensor."""
    results = []
    for layer in layers:
        for tensor in layer:
            batch, heads, _, channels = tensor.shape
            expanded = index[:, None].expand(batch, heads, -1, channels)
            results.append(tensor.gather(2, expanded).contiguous())
    return results


def flat(layers: Any, index: Tensor, **_: Any) -> list[Tensor]:
    """index_select on the rows of all heads laid flat, the index computed once per layer."""
    results = []
    for layer in layers:
        batch, heads, tokens, channels = layer[0].shape
        first = torch.arange(batch * heads, device=index.device)[:, None] * tokens
        rows = (first + index).reshape(-1)
        for tensor in layer:
            chosen = tensor.reshape(-1, channels).index_select(0, rows)
            results.append(chosen.view(batch, heads, -1, channels))
    return results


def along_tokens(layers: Any, index: Tensor, **_: Any) -> list[Tensor]:
    """index_select along the token dimension, as MustDrop's cache step does it."""
    return [tensor.index_select(2, index) for layer in layers for tensor in layer]


def hashes(rows: Tensor) -> Tensor:
    """A hash of every row, ascending in each head: which rows there are, whatever their order."""
    words = rows.view(torch.int64)
    factors = torch.randint(2**62, words.shape[-1:], generator=torch.Generator().manual_seed(0))
    return (words * factors.to(words.device)).sum(-1).sort(-1).values


def same_rows(
    got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]
) -> None:
    """Peers keep ascending order; where ours fills holes, the same rows stand in another one."""
    filled = kwargs.get("order") == "fill"
    for g, w in zip(got, want, strict=False):
        g = g.to(w.dtype)
        g, w = (hashes(g), hashes(w)) if filled else (g, w)
        assert torch.equal(g, w), "other rows than the reference"


PEERS = {
    "kvpress: gather, expanded index": Peer(gather, compiled=True, compare=same_rows),
    "flat index_select": Peer(flat, compare=same_rows),
    "index_select along tokens": Peer(along_tokens, compare=same_rows),
}
"""The compiler makes the same loops of all three, so one of them is compiled."""
