"""What people write today for softmax pooling: softmax and bmm, and
scaled_dot_product_attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Peer, roughly


def softmax_bmm(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """The scores of all slots, softmax over the tokens as last dimension, product with the
    values.
    """
    return [torch.bmm(torch.softmax(query @ key.mT, -1), value)]


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """One head whose queries are the slots."""
    slots = query.expand(key.shape[0], 1, *query.shape[-2:])
    return [F.scaled_dot_product_attention(slots, key[:, None], value[:, None], scale=1.0)[:, 0]]


def sdpa_two_heads(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Values split into two heads under the same queries and keys: smaller head dims, scores made
    twice.
    """
    batch, tokens, channels = value.shape
    slots = query.expand(batch, 2, *query.shape[-2:])
    keys = key[:, None].expand(batch, 2, tokens, key.shape[2])
    values = value.view(batch, tokens, 2, channels // 2).transpose(1, 2)
    heads = F.scaled_dot_product_attention(slots, keys, values, scale=1.0)
    return [heads.transpose(1, 2).reshape(batch, -1, channels)]


PEERS = {
    "softmax + bmm": Peer(softmax_bmm, compiled=True, compare=roughly),
    "scaled_dot_product_attention": Peer(sdpa, compare=roughly),
    "scaled_dot_product_attention, 2 heads": Peer(sdpa_two_heads, compare=roughly),
}
