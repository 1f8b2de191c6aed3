"""assign_nearest: the nearest code of every token, without the matrix of distances."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._op import Case, Make, Op, autocast
from ..checks.assign_nearest import assign_nearest as _check

CENTRE_CODES = 64
CHUNK = 4096
"""Rows that the reference compares at a time: the matrix of distances of all of them may not fit."""


class Assigned(NamedTuple):
    """What assign_nearest returns; None for what was not asked for."""

    index: Tensor
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

    Exact: the index is that of float64, unless the two best squared distances lie within 1e-6·(‖x−μ‖² + ‖e−μ‖²) of each other (μ the
    mean code with "l2", 0 otherwise; with "cosine" x and e have length 1): then either of the two. Equal codes: the lower index. A token
    with a NaN or an infinity gets index 0; a code with one is never chosen (index 0 where there is no other). No gradient: the
    straight-through estimator belongs to the caller. Nothing is copied whatever the strides; a packed copy of the codebook is made.

    Args:
        x: (…, D), or (…, G, D) with G codebooks, at most 9 dimensions; float32, float16 or bfloat16. Arithmetic is float32.
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

    Source: VQ-VAE (van den Oord et al. 2017), eq. 1; the form ⟨x,e⟩ − ½‖e‖² is theirs with ‖x‖² dropped.

    Example:
        >>> import torch, tokenkernels as tk
        >>> tk.assign_nearest(torch.tensor([[0.9, 0.1]]), torch.eye(2), return_distance=True)[:2]
        (tensor([0]), tensor([0.0200]))
    """
    _check(x, codebook, metric, return_distance, return_codes, backend)
    if x.requires_grad or codebook.requires_grad:
        x, codebook = x.detach(), codebook.detach()
    x, codebook = autocast(x, codebook)
    index, distance, codes = OP(backend, x.device.type, x, codebook, metric, return_distance, return_codes)
    return Assigned(index, distance if return_distance else None, codes if return_codes else None)


def _centre(codebook: Tensor) -> Tensor:
    """The mean of evenly spaced codes, of those among them that are finite."""
    count = min(CENTRE_CODES, codebook.shape[0])
    spaced = codebook[torch.arange(count, device=codebook.device) * codebook.shape[0] // count]
    return spaced[spaced.isfinite().all(-1)].mean(0).nan_to_num(0)


def _nearest(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """x (N, D), codebook (K, D), wide."""
    usable = codebook.isfinite().all(-1)
    whole = x.isfinite().all(-1)
    if metric == "l2":
        centre = _centre(codebook)
        x, codebook = x - centre, codebook - centre
    elif metric == "cosine":
        x, codebook = F.normalize(x, dim=-1, eps=1e-12), F.normalize(codebook, dim=-1, eps=1e-12)
    codebook = torch.where(usable[:, None], codebook, 0)
    bias = codebook.square().sum(-1) / 2 if metric == "l2" else 0
    found = [
        (part @ codebook.T - bias).masked_fill(~usable, -torch.inf).argmax(-1) for part in x.split(CHUNK)
    ]  # fmt: skip
    return torch.where(whole, torch.cat(found), 0)


def _distance(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    if metric == "l2":
        return (x - codes).square().sum(-1)
    if metric == "cosine":
        return 1 - (F.normalize(x, dim=-1, eps=1e-12) * F.normalize(codes, dim=-1, eps=1e-12)).sum(-1)
    return -(x * codes).sum(-1)


def _reference(
    x: Tensor, codebook: Tensor, metric: str, return_distance: bool, return_codes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    books = codebook if codebook.ndim == 3 else codebook[None]
    groups, _, dim = books.shape
    rows = x.reshape(x.shape[:-1].numel() // groups, groups, dim)
    index = torch.stack([_nearest(rows[:, g].to(wide), books[g].to(wide), metric) for g in range(groups)], 1)
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


def near_enough(x: Tensor, codebook: Tensor, got: Tensor, want: Tensor, metric: str, slack: float | Tensor = 0) -> None:
    """Raises where an index is neither that of float64 nor within rounding of it. x (N, D), codebook (K, D), float64; indices (N)."""
    other = (got != want).nonzero()[:, 0]
    x, ours, theirs = x[other], codebook[got[other]], codebook[want[other]]
    slack = slack[other] if isinstance(slack, Tensor) else slack
    assert not (ours == theirs).all(-1).any(), "of equal codes not the first"
    if metric == "cosine":
        x, ours, theirs = (F.normalize(t, dim=-1, eps=1e-12) for t in (x, ours, theirs))
    centre = codebook[codebook.isfinite().all(-1)].mean(0) if metric == "l2" else 0
    gap = 2 * (x * (theirs - ours)).sum(-1)
    if metric == "l2":
        gap = (x - ours).square().sum(-1) - (x - theirs).square().sum(-1)
    allowed = 1e-6 * ((x - centre).square().sum(-1) + (theirs - centre).square().sum(-1)) + slack
    assert (gap <= allowed).all(), f"rows {other[~(gap <= allowed)][:4].tolist()}: a code that is farther off"


def _compare(got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]) -> None:
    x, codebook, metric = kwargs["x"].double(), kwargs["codebook"].double(), kwargs.get("metric", "l2")
    assert [t.shape for t in got] == [t.shape for t in want][: len(got)] and got[0].dtype == torch.int64
    books = codebook if codebook.ndim == 3 else codebook[None]
    rows = x.reshape(-1, books.shape[0], books.shape[2])
    found, right = got[0].reshape(rows.shape[:2]), want[0].reshape(rows.shape[:2])
    for g, book in enumerate(books):
        near_enough(rows[:, g], book, found[:, g], right[:, g], metric)
    codes = torch.stack([book[found[:, g]] for g, book in enumerate(books)], 1)
    for values in got[1:]:
        if values.shape == x.shape:
            assert torch.equal(values.double().nan_to_num(7), codes.view(x.shape).nan_to_num(7)), "codes"
            continue
        truth = _distance(rows, codes, metric).view(values.shape)
        scale = {"l2": truth, "cosine": 1, "dot": (rows.norm(dim=-1) * codes.norm(dim=-1)).view(values.shape)}[metric]
        bound = torch.finfo(torch.float32).eps * (8 + 2 * x.shape[-1] ** 0.5) * scale
        assert torch.equal(values.isnan(), truth.isnan()), "distance: NaN in other places"
        finite = truth.isfinite()
        assert ((values - truth).abs() <= bound)[finite].all(), "distance"


def _simple(shape: tuple[int, ...], codes: int, **options: Any) -> Any:
    def make(t: Make) -> dict[str, Any]:
        return {"x": t.randn(*shape), "codebook": t.randn(codes, shape[-1]), **options}

    return make


def _grouped(t: Make) -> dict[str, Any]:
    return {"x": t.randn(2, 9, 3, 20), "codebook": t.randn(3, 40, 20), "return_distance": True, "return_codes": True}


def _hard(metric: str, dim: int) -> Any:
    def make(t: Make) -> dict[str, Any]:
        codebook = t.randint(-2, 3, (90, dim)).to(t.dtype)
        codebook[60:80] = codebook[20:40]
        codebook[[0, 64], 0] = torch.tensor([torch.nan, torch.inf], dtype=t.dtype)
        codebook[7] = 0
        x = codebook[t.randint(0, 90, (4, 20))].nan_to_num(1, 1) + t.randint(0, 2, (4, 20, dim)).to(t.dtype)
        x[0, 3, -1], x[1, 4, 0], x[2, 5] = torch.nan, -torch.inf, -0.0
        return {"x": x, "codebook": codebook, "metric": metric, "return_distance": True, "return_codes": True}

    return make


def _far_from_the_origin(t: Make) -> dict[str, Any]:
    return {"x": t.randn(3, 40, 24) + 1000, "codebook": t.randn(128, 24) + 1000, "return_distance": True}


def _positive(metric: str) -> Any:
    def make(t: Make) -> dict[str, Any]:
        return {"x": t.rand(2, 50, 512), "codebook": t.rand(300, 512), "metric": metric, "return_distance": True}

    return make


def _tiny_codes(t: Make) -> dict[str, Any]:
    return {"x": t.randn(2, 30, 32), "codebook": (t.rand(700, 32) * 2 - 1) / 4096}


def _channels_first(t: Make) -> dict[str, Any]:
    return {"x": t.randn(2, 12, 1, 19).permute(0, 2, 3, 1), "codebook": t.randn(65, 12), "return_codes": True}


def _many_strides(t: Make) -> dict[str, Any]:
    return {"x": t.randn(3, 4, 3, 4, 3, 10)[::2, 1:, :2, ::3, 1:], "codebook": t.randn(2, 33, 10)[:, ::2]}


def _empty_poison(t: Make) -> dict[str, Any]:
    codebook = t.randn(5, 3) * torch.nan
    return {"x": t.randn(2, 4, 3), "codebook": codebook, "return_distance": True}


def _bench(rows: int, codes: int, dim: int, **options: Any) -> Case:
    name = " ".join([f"{rows}x{codes}x{dim}", *(str(v) for v in options.values() if isinstance(v, str))])
    return Case(name, _simple((rows, dim), codes, **options), ("bench",))


def _cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    x, codebook = kwargs["x"], kwargs["codebook"]
    rows = x.numel() / x.shape[-1]
    moved = (x.numel() + codebook.numel()) * x.element_size() + 8 * rows
    moved += 4 * rows * kwargs.get("return_distance", False)
    moved += 2 * x.numel() * x.element_size() * kwargs.get("return_codes", False)
    return moved, 2 * x.numel() * codebook.shape[-2]


CASES = [
    Case("l2", _simple((2, 37, 8), 150)),
    Case("cosine", _simple((2, 37, 12), 100, metric="cosine", return_distance=True, return_codes=True)),
    Case("dot", _simple((3, 11, 5), 64, metric="dot", return_distance=True)),
    Case("one-dimension", _simple((7, 1), 30, return_distance=True)),
    Case("one-code", _simple((3, 4, 17), 1, return_codes=True)),
    Case("wide", _simple((1, 23, 70), 131, return_distance=True)),
    Case("wide-cosine", _simple((2, 9, 130), 66, metric="cosine", return_distance=True)),
    Case("wide-codes", _simple((6, 257), 80, return_codes=True, return_distance=True)),
    Case("many-codes", _simple((5, 16), 3000)),
    Case("grouped", _grouped),
    Case("ties-nan-inf", _hard("l2", 6)),
    Case("ties-nan-inf-wide", _hard("l2", 20)),
    Case("ties-nan-inf-cosine", _hard("cosine", 6)),
    Case("ties-nan-inf-dot", _hard("dot", 6)),
    Case("offset", _far_from_the_origin),
    Case("positive-dot", _positive("dot")),
    Case("positive-cosine", _positive("cosine")),
    Case("tiny-codes", _tiny_codes),
    Case("channels-first", _channels_first),
    Case("many-strides", _many_strides),
    Case("no-usable-code", _empty_poison),
    Case("one-token", _simple((33,), 40, return_distance=True), ("test", "coupled")),
    _bench(8192, 4096, 12),
    _bench(8192, 4096, 12, metric="cosine"),
    _bench(8192, 16384, 8),
    _bench(6000, 1024, 8),
    _bench(4096, 1024, 256),
    _bench(6000, 1024, 128),
    _bench(2048, 16384, 256),
]

OP = Op(
    schema="assign_nearest(Tensor x, Tensor codebook, str metric, bool return_distance, bool return_codes) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=assign_nearest,
    cases=CASES,
    bad=[
        (lambda kw: {"metric": "l1"}, ValueError, "assign_nearest: metric: allowed 'l2', 'cosine', 'dot', got 'l1'"),
        (lambda kw: {"x": kw["x"].long()}, TypeError, "assign_nearest: x: allowed a tensor of float32"),
        (lambda kw: {"x": kw["x"].double()}, TypeError, 'backend="reference"'),
        (lambda kw: {"x": kw["x"][..., :7]}, ValueError, r"assign_nearest: x: allowed \(…, D\) = \(…, 8\)"),
        (lambda kw: {"x": kw["x"][0, 0, 0]}, ValueError, "assign_nearest: x: allowed"),
        (lambda kw: {"codebook": kw["codebook"].half()}, TypeError, "assign_nearest: codebook: allowed the dtype of x"),
        (lambda kw: {"codebook": kw["codebook"][:0]}, ValueError, "assign_nearest: codebook: allowed K of 1"),
        (lambda kw: {"codebook": kw["codebook"][0]}, ValueError, "assign_nearest: codebook: allowed 2 or 3 dim"),
        (lambda kw: {"codebook": kw["codebook"][None]}, ValueError, r"assign_nearest: x: allowed \(…, G, D\)"),
        (lambda kw: {"codebook": None}, TypeError, "assign_nearest: codebook: allowed a tensor"),
        (lambda kw: {"return_codes": 1}, TypeError, "assign_nearest: return_codes: allowed True, False, got int 1"),
    ],
    cost=_cost,
    length=lambda kwargs: kwargs["x"].shape[-1],
    compare=_compare,
    batch=("x",),
)
