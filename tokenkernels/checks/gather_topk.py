"""What gather_topk refuses, and the one form its budgets take."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from . import (
    NUMPY,
    choice,
    dtype,
    fail,
    floating,
    integer,
    number,
    rank,
    same_device,
    same_kind,
    shape,
)

OP = "gather_topk"


def gather_topk(
    tensors: tuple[Any, ...],
    scores: Any,
    k: Any,
    keep: Any,
    prefix: Any,
    order: Any,
    threshold: Any,
    fuse: Any,
    backend: str | None = NUMPY,
) -> list[int]:
    """Raises where an argument is off; returns the budgets: one for all images or one per image;
    [0] with a threshold.
    """
    floating(OP, "scores", scores, backend)
    rank(OP, "scores", scores, 2)
    batch, tokens = scores.shape
    integer(OP, "prefix", prefix, 0)
    if not 1 <= len(tensors) <= 16:
        fail(OP, "x", "1 … 16 tensors", len(tensors))
    for x in tensors:
        same_kind(OP, "x", x, scores)
        rank(OP, "x", x, 2, 3)
        if x.shape[0] != batch or x.shape[1] != prefix + tokens:
            fail(
                OP,
                "x",
                f"(B, P+N) = ({batch}, {prefix + tokens}) as first dimensions",
                tuple(x.shape),
            )
        same_device(OP, "x", x, scores, "scores")
        if fuse is not None:
            floating(OP, "x (with fuse)", x, backend)
    if keep is not None:
        dtype(OP, "keep", keep, ("bool",))
        shape(OP, "keep", keep, batch, tokens)
        same_device(OP, "keep", keep, scores, "scores")
    choice(OP, "order", order, "index", "score")
    choice(OP, "fuse", fuse, None, "sum", "mean")
    if (k is None) == (threshold is None):
        fail(OP, "k, threshold", "exactly one of the two", f"k={k}, threshold={threshold}")
    if k is None:
        number(OP, "threshold", threshold)
        return [0]
    return _budgets(k, batch, tokens)


def is_dense(k: Any) -> bool:
    """k is one budget for all images: the outputs are (B, …)."""
    return isinstance(k, (int, Integral))


def _budgets(k: Any, batch: int, tokens: int) -> list[int]:
    if isinstance(k, int):
        integer(OP, "k", k, 0, tokens)
        return [k]
    if hasattr(k, "tolist") and getattr(k, "ndim", 0) == 1:
        dtype(OP, "k", k, ("int64", "int32"))
        k = k.tolist()
    if not isinstance(k, (list, tuple)):
        integer(OP, "k", k, 0, tokens)
        return [int(k)]
    if len(k) != batch:
        fail(OP, "k", f"an int, or {batch} ints (one per image)", f"{len(k)} ints")
    for budget in k:
        integer(OP, "k", budget, 0, tokens)
    return [budget if isinstance(budget, int) else int(budget) for budget in k]
