"""What people use today to find the nearest code: addmm or cdist and argmin, faiss. The module that
most quantisers are built from is met as a whole, in bench/vq_training.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import Peer


def addmm(x: Tensor, codebook: Tensor, metric: str = "l2", **_: Any) -> list[Tensor]:
    """The distance matrix by one product with ‖e‖² added, then argmin; quantisers use float32."""
    x, codebook = x.float(), codebook.float()
    if metric == "cosine":
        return [(F.normalize(x, dim=-1) @ F.normalize(codebook, dim=-1).T).argmax(-1)]
    squares = codebook.square().sum(-1)
    return [torch.addmm(squares, x, codebook.T, alpha=-2).argmin(-1)]


def cdist(x: Tensor, codebook: Tensor, metric: str = "l2", **_: Any) -> list[Tensor] | Any:
    """torch.cdist, then argmin."""
    return [torch.cdist(x, codebook).argmin(-1)] if metric == "l2" else NotImplemented


def faiss_flat(x: Tensor, codebook: Tensor, metric: str = "l2", **_: Any) -> list[Tensor] | Any:
    """faiss's exact search on torch's number of threads."""
    if x.device.type != "cpu":
        return NotImplemented
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    kind = faiss.METRIC_L2
    if metric == "cosine":
        x, codebook = F.normalize(x, dim=-1), F.normalize(codebook, dim=-1)
        kind = faiss.METRIC_INNER_PRODUCT
    index = faiss.knn(x.numpy(), codebook.numpy(), 1, metric=kind)[1]
    return [torch.from_numpy(index)[:, 0]]


def formula(x: Tensor, codebook: Tensor, metric: str = "l2", **_: Any) -> list[Tensor] | Any:
    """vector-quantize-pytorch's distances, its one-hot codes left out."""
    if metric != "l2":
        return NotImplemented
    squares = x.square().sum(-1)[:, None] + codebook.square().sum(-1)
    distance = (squares + torch.einsum("id,jd->ij", x, codebook) * -2).clamp(min=1e-8).sqrt()
    return [(-distance).argmax(-1)]


def most(got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]) -> None:
    """These round as they like: nearly every index is that of float64."""
    right = (got[0] == want[0]).double().mean().item()
    assert right > 0.995, f"{right:.1%} of the indices are right"


FLOAT32 = (torch.float32,)
PEERS = {
    "addmm, argmin": Peer(addmm, compiled=True, compare=most),
    "cdist, argmin": Peer(cdist, dtypes=FLOAT32, compare=most),
    "faiss": Peer(faiss_flat, dtypes=FLOAT32, compare=most),
    "vector-quantize-pytorch's formula": Peer(formula, dtypes=FLOAT32, compare=most),
}
