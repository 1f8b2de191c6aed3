"""What people use today for EMA statistics: a product with one-hot codes, or index_add."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import Peer


def one_hot(x: Tensor, index: Tensor, K: int) -> list[Tensor]:
    """vector-quantize-pytorch and EnCodec: one-hot codes, summed and multiplied by tokens."""
    codes = F.one_hot(index, K).to(x.dtype)
    return [codes.sum(0).long(), (codes.T @ x).float()]


def index_add(x: Tensor, index: Tensor, K: int) -> list[Tensor]:
    """bincount and index_add."""
    sums = torch.zeros(K, x.shape[-1], device=x.device).index_add_(0, index, x.float())
    return [torch.bincount(index, minlength=K), sums]


FLOAT32 = (torch.float32,)
PEERS = {
    "one-hot product": Peer(one_hot, dtypes=FLOAT32),
    "bincount, index_add": Peer(index_add, compiled=True),
}
