"""What people use today for residual quantisation: a loop of distance matrices, and the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Peer


def loop(x: Tensor, codebooks: Tensor) -> list[Tensor]:
    """EnCodec's loop: distance matrix, argmin, look-up, subtraction, round by round."""
    chosen = []
    for book in codebooks:
        index = torch.addmm(book.square().sum(-1), x, book.T, alpha=-2).argmin(-1)
        x = x - book[index]
        chosen.append(index)
    return [torch.stack(chosen, -1), x]


_made: list[Any] = []
"""The last codebooks and the module that holds them: making one is no part of a call."""


def module(x: Tensor, codebooks: Tensor) -> list[Tensor]:
    """vector-quantize-pytorch's ResidualVQ in eval mode."""
    from vector_quantize_pytorch import ResidualVQ

    if not _made or _made[0] is not codebooks:
        rounds, codes, dim = codebooks.shape
        made = ResidualVQ(dim=dim, num_quantizers=rounds, codebook_size=codes).eval().to(x.device)
        for layer, book in zip(made.layers, codebooks, strict=True):
            layer._codebook.embed.data.copy_(book)
        _made[:] = [codebooks, made]
    quantized, index, _ = _made[1](x[None])
    return [index[0], x - quantized[0]]


def most(got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]) -> None:
    """These round as they like: nearly every index is that of float64."""
    right = (got[0] == want[0]).double().mean().item()
    assert right > 0.9, f"{right:.1%} of the indices are right"


FLOAT32 = (torch.float32,)
PEERS = {
    "loop of addmm, argmin": Peer(loop, compiled=True, dtypes=FLOAT32, compare=most),
    "vector-quantize-pytorch, eval": Peer(module, dtypes=FLOAT32, compare=most),
}
