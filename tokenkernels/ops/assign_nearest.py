"""assign_nearest: the nearest code of every token, without the matrix of distances."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._case import close
from .._op import Op, autocast
from ..cases import assign_nearest as cases
from ..checks.assign_nearest import assign_nearest as _check
from ._codes import near_enough, nearest, normalize


class Assigned(NamedTuple):
    """What assign_nearest returns; None for what was not asked for."""

    index: Tensor  # type: ignore[assignment]
    distance: Tensor | None
    codes: Tensor | None


def assign_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    return_distance: bool = False,
    return_codes: bool = False,
    backend: str | None = None,
) -> Assigned:
    """Finds the nearest of K codes for every token; no N×K matrix is ever in memory.

    Exact: the index is that of float64, unless the two best squared distances lie within
    1e-6·(‖x−μ‖² + ‖e−μ‖²) of each other (μ the mean code with "l2", 0 otherwise; with "cosine" x
    and e have length 1): then either of the two. Equal codes: the lower index. A token with a NaN
    or an infinity gets index 0; a code with one is never chosen (index 0 where there is no other).
    No gradient: the straight-through estimator belongs to the caller. All strides are read in
    place; the codebook is packed once per call.

    Args:
        x: (…, D), or (…, G, D) with G codebooks; at most 9 dimensions; float32, float16 or
            bfloat16. Arithmetic is float32 throughout.
        codebook: (K, D), or (G, K, D): one codebook per group; the dtype of x. D up to 512.
        metric: "l2" the smallest ‖x−e‖², "cosine" the largest cosine, "dot" the largest ⟨x, e⟩.
        return_distance: Also the distance: ‖x−e‖², 1 − cosine, or −⟨x, e⟩.
        return_codes: Also the chosen rows of the codebook, as they are (not normalised).
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        index: int64, the shape of x without D.
        distance: float32, the same shape, or None.
        codes: The shape and dtype of x, or None.

    Raises:
        ValueError: shapes that do not fit, an empty codebook, an unknown metric.
        TypeError: dtypes outside the list, or two different ones.

    Source: VQ-VAE (van den Oord et al. 2017), equation 1; scored as ⟨x,e⟩ − ½‖e‖².

    Example:
        >>> import torch, tokenkernels as tk
        >>> tk.assign_nearest(torch.tensor([[0.9, 0.1]]), torch.eye(2), return_distance=True)[:2]
        (tensor([0]), tensor([0.0200]))
    """
    x, codebook = autocast(x, codebook)
    _check(x, codebook, metric, return_distance, return_codes, backend)
    if x.requires_grad or codebook.requires_grad:
        x, codebook = x.detach(), codebook.detach()
    index, distance, codes = OP(
        backend, x.device.type, x, codebook, metric, return_distance, return_codes
    )
    return Assigned(index, distance if return_distance else None, codes if return_codes else None)


def _distance(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    if metric == "l2":
        return (x - codes).square().sum(-1)
    if metric == "cosine":
        return 1 - (normalize(x) * normalize(codes)).sum(-1)
    return -(x * codes).sum(-1)


def _reference(
    x: Tensor, codebook: Tensor, metric: str, return_distance: bool, return_codes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    books = codebook if codebook.ndim == 3 else codebook[None]
    groups, _, dim = books.shape
    rows = x.reshape(x.shape[:-1].numel() // groups, groups, dim)
    index = torch.stack(
        [nearest(rows[:, g].to(wide), books[g].to(wide), metric) for g in range(groups)], 1
    )
    codes = torch.stack([books[g][index[:, g]] for g in range(groups)], 1)
    distance = _distance(rows.to(wide), codes.to(wide), metric)
    index = index.view(x.shape[:-1])
    distance = distance.view(x.shape[:-1]) if return_distance else distance.new_empty(0)
    return index, distance, codes.view(x.shape) if return_codes else codes.new_empty(0)


def _fake(
    x: Tensor, codebook: Tensor, metric: str, return_distance: bool, return_codes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape[:-1], dtype=torch.int64),
        x.new_empty(x.shape[:-1] if return_distance else (0,), dtype=wide),
        x.new_empty(x.shape if return_codes else (0,)),
    )


def _compare(
    got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]
) -> None:
    x, codebook = kwargs["x"].double(), kwargs["codebook"].double()
    metric = kwargs.get("metric", "l2")
    assert [t.shape for t in got] == [t.shape for t in want][: len(got)]
    books = codebook if codebook.ndim == 3 else codebook[None]
    rows = x.reshape(-1, books.shape[0], books.shape[2])
    found, right = got[0].reshape(rows.shape[:2]), want[0].reshape(rows.shape[:2])
    for g, book in enumerate(books):
        near_enough(rows[:, g], book, found[:, g], right[:, g], metric)
    codes = torch.stack([book[found[:, g]] for g, book in enumerate(books)], 1)
    for values in got[1:]:
        if values.shape == x.shape:
            close([values], [codes.view(x.shape)], [values], 1)
        else:
            _compare_distance(values, rows, codes, metric)


def _compare_distance(values: Tensor, rows: Tensor, codes: Tensor, metric: str) -> None:
    """Rounding errors are as large as the numbers that cancel: lengths of 1, or ‖x‖·‖e‖."""
    truth = _distance(rows, codes, metric).view(values.shape)
    scale = {"l2": truth, "cosine": 1, "dot": rows.norm(dim=-1) * codes.norm(dim=-1)}[metric]
    bound = torch.finfo(torch.float32).eps * (8 + 2 * rows.shape[-1] ** 0.5) * scale
    assert torch.equal(values.isnan(), truth.isnan()), "distance: NaN in other places"
    error = torch.where(truth.isfinite(), (values - truth).abs(), 0)
    bound = torch.as_tensor(bound, device=error.device).flatten().nan_to_num(0)
    assert (error.flatten() <= bound).all(), "distance"


OP = Op(
    schema="assign_nearest(Tensor x, Tensor codebook, str metric, bool return_distance, "
    "bool return_codes) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=assign_nearest,
    cases=cases.CASES,
    bad=cases.BAD,
    cost=cases.cost,
    length=lambda kwargs: kwargs["x"].shape[-1],
    compare=_compare,
    batch=("x",),
    launches=lambda kwargs: (2 if kwargs["x"].shape[-1] <= 2 else 3, 0),
)
