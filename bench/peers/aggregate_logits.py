"""What people write today with given logits: softmax over the tokens, bmm. Attention kernels take
no logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Peer, roughly


def softmax_bmm(logits: Tensor, value: Tensor) -> list[Tensor]:
    """As Soft MoE, TokenLearner and NetVLAD code does it: softmax over dim 1, transposed
    product.
    """
    return [torch.bmm(torch.softmax(logits, 1).mT, value)]


def transposed_first(logits: Tensor, value: Tensor) -> list[Tensor]:
    """Logits turned first, so that the softmax runs over the last dimension."""
    return [torch.bmm(torch.softmax(logits.mT.contiguous(), -1), value)]


PEERS = {
    "softmax + bmm": Peer(softmax_bmm, compiled=True, compare=roughly),
    "transposed softmax + bmm": Peer(transposed_first, compiled=True, compare=roughly),
}
