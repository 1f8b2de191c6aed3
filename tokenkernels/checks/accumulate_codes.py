"""What accumulate_codes refuses."""

from __future__ import annotations

from typing import Any

from . import NUMPY, dtype, fail, flag, floating, integer, same_device
from .codes import MAX_CODES

OP = "accumulate_codes"


def accumulate_codes(
    x: Any, index: Any, codes: Any, grouped: Any, backend: str | None = NUMPY
) -> None:
    """Raises where an argument is off; values of `index` are looked at by the kernel."""
    floating(OP, "x", x, backend)
    dtype(OP, "index", index, ("int64",))
    flag(OP, "grouped", grouped)
    if not 1 + grouped <= x.ndim <= 9 or x.shape[-1] < 1 or (grouped and x.shape[-2] < 1):
        fail(
            OP,
            "x",
            ("(…, G, D)" if grouped else "(…, D)") + " of at most 9 dimensions, G and D ≥ 1",
            tuple(x.shape),
        )
    if tuple(index.shape) != tuple(x.shape[:-1]):
        fail(OP, "index", f"the shape of x without D {tuple(x.shape[:-1])}", tuple(index.shape))
    same_device(OP, "index", index, x, "x")
    integer(OP, "K", codes, 1, MAX_CODES)
