"""SiT's slimming in torch: as the authors write it, with a contiguous softmax, as attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Peer, roughly


def _hidden(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    return F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), w1, b1))


def official(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale: Tensor,
) -> list[Tensor]:
    """Logits as (B, N, M), softmax along the tokens, then a batched product."""
    logits = scale * F.linear(_hidden(x, norm_weight, norm_bias, w1, b1), w2)
    return [torch.bmm(F.softmax(logits, dim=1).transpose(1, 2), x)]


def slots_first(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale: Tensor,
) -> list[Tensor]:
    """Logits as (B, M, N): the softmax runs along contiguous memory."""
    logits = (scale * w2) @ _hidden(x, norm_weight, norm_bias, w1, b1).transpose(1, 2)
    return [torch.bmm(F.softmax(logits, dim=-1), x)]


def attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale: Tensor,
) -> list[Tensor]:
    """One attention head: the slots are queries, the hidden layer is keys, x is values."""
    keys = _hidden(x, norm_weight, norm_bias, w1, b1)[:, None]
    queries = (scale * w2).expand(len(x), 1, -1, -1)
    return [F.scaled_dot_product_attention(queries, keys, x[:, None], scale=1.0)[:, 0]]


def two_heads(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale: Tensor,
) -> list[Tensor]:
    """Two heads of C/2 channels with equal weights: keys and values are then equally wide."""
    if x.shape[2] != 2 * w1.shape[0]:
        return NotImplemented
    keys = _hidden(x, norm_weight, norm_bias, w1, b1)[:, None].expand(-1, 2, -1, -1)
    queries = (scale * w2).expand(len(x), 2, -1, -1)
    values = x.unflatten(2, (2, -1)).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
    return [mixed.transpose(1, 2).flatten(2)]


PEERS = {
    "official": Peer(official, compiled=True, compare=roughly),
    "slots first": Peer(slots_first, compiled=True, compare=roughly),
    "SDPA": Peer(attention, compare=roughly),
    "SDPA, two heads": Peer(two_heads, compare=roughly),
}
