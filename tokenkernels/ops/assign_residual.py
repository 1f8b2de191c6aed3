"""assign_residual: the whole chain of a residual vector quantiser in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._op import Op, autocast
from ..cases import assign_residual as cases
from ..checks.assign_residual import assign_residual as _check
from ._codes import near_enough, nearest


class Residual(NamedTuple):
    """What assign_residual returns."""

    index: Tensor  # type: ignore[assignment]
    residual: Tensor


def assign_residual(x: Tensor, codebooks: Tensor, *, backend: str | None = None) -> Residual:
    """Quantises tokens in Q rounds, each on what the rounds before left over.

    Every round is `assign_nearest` with "l2": exact, ties to the lower index, index 0 for what is
    not finite. The residual stays in float32 throughout and is rounded once, at the end. No
    gradient.

    Args:
        x: (…, D), at most 9 dimensions; float32, float16 or bfloat16.
        codebooks: (Q, K, D), one per round; the dtype of x. D up to 512.
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        index: int64 (…, Q).
        residual: The shape and dtype of x: x minus its Q codes.

    Raises:
        ValueError: shapes that do not fit, empty codebooks.
        TypeError: dtypes outside the list, or two different ones.

    Source: SoundStream (Zeghidour et al. 2021), algorithm 1; EnCodec, Mimi.

    Example:
        >>> import torch, tokenkernels as tk
        >>> books = torch.tensor([[[0.0], [1.0]], [[0.0], [0.25]]])
        >>> tk.assign_residual(torch.tensor([[1.3]]), books).index
        tensor([[1, 1]])
    """
    x, codebooks = autocast(x, codebooks)
    _check(x, codebooks, backend)
    if x.requires_grad or codebooks.requires_grad:
        x, codebooks = x.detach(), codebooks.detach()
    return Residual(*OP(backend, x.device.type, x, codebooks))


def _reference(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    residual = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(wide)
    chosen = []
    for book in codebooks.to(wide):
        chosen.append(nearest(residual, book, "l2"))
        residual = residual - book[chosen[-1]]
    index = torch.stack(chosen, -1).view(*x.shape[:-1], len(chosen))
    return index, residual.to(x.dtype).view(x.shape)


def _fake(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    index = x.new_empty((*x.shape[:-1], codebooks.shape[0]), dtype=torch.int64)
    return index, x.new_empty(x.shape)


def _compare(
    got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]
) -> None:
    """Follows the chain of `got` in float64: two chains part where a round was free to choose."""
    x, books = kwargs["x"].double(), kwargs["codebooks"].double()
    assert [t.shape for t in got] == [t.shape for t in want]
    index = got[0].reshape(-1, books.shape[0])
    residual = x.reshape(-1, x.shape[-1])
    start = residual.norm(dim=-1)
    eps = torch.finfo(torch.float32).eps
    for round, book in enumerate(books):
        right = nearest(residual, book, "l2")
        distance = (residual - book[right]).norm(dim=-1)
        rounded = 4 * eps * round * start * distance
        near_enough(residual, book, index[:, round], right, "l2", rounded)
        residual = residual - book[index[:, round]]
    residual = residual.view(x.shape)
    assert torch.equal(got[1].isnan(), residual.isnan()), "residual: NaN in other places"
    error = (got[1] - residual).abs().nan_to_num(0, 0)
    scale = x.abs().nan_to_num(0, 0).amax(-1, keepdim=True) if x.numel() else x
    bound = eps * 2 * len(books) * scale
    bound = bound + torch.finfo(got[1].dtype).eps * residual.abs().nan_to_num(0, 0)
    assert (error <= bound).all(), "residual"


OP = Op(
    schema="assign_residual(Tensor x, Tensor codebooks) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=assign_residual,
    cases=cases.CASES,
    bad=cases.BAD,
    cost=cases.cost,
    length=lambda kwargs: kwargs["x"].shape[-1],
    compare=_compare,
    batch=("x",),
    launches=lambda kwargs: (2, 0),
)
