"""What assign_nearest refuses."""

from __future__ import annotations

from typing import Any

from . import NUMPY, choice, fail, flag, floating, same_device, same_dtype
from .codes import codebooks

OP = "assign_nearest"


def assign_nearest(
    x: Any,
    codebook: Any,
    metric: Any,
    return_distance: Any,
    return_codes: Any,
    backend: str | None = NUMPY,
) -> None:
    """Raises where an argument is off."""
    floating(OP, "x", x, backend)
    codebooks(OP, "codebook", codebook, backend, 2, 3)
    same_dtype(OP, "codebook", codebook, x, "x")
    same_device(OP, "codebook", codebook, x, "x")
    grouped = codebook.ndim == 3
    tail = tuple(codebook.shape[::2]) if grouped else (codebook.shape[-1],)
    if not len(tail) <= x.ndim <= 9 or tuple(x.shape[-len(tail) :]) != tail:
        allowed = (
            f"(…, G, D) = (…, {tail[0]}, {tail[1]})" if grouped else f"(…, D) = (…, {tail[0]})"
        )
        fail(OP, "x", allowed + " of at most 9 dimensions", tuple(x.shape))
    choice(OP, "metric", metric, "l2", "cosine", "dot")
    flag(OP, "return_distance", return_distance)
    flag(OP, "return_codes", return_codes)
