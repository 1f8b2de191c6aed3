"""What assign_residual refuses."""

from __future__ import annotations

from typing import Any

from . import NUMPY, fail, floating, same_device, same_dtype
from .codes import codebooks

OP = "assign_residual"


def assign_residual(x: Any, books: Any, backend: str | None = NUMPY) -> None:
    """Raises where an argument is off."""
    floating(OP, "x", x, backend)
    codebooks(OP, "codebooks", books, backend, 3)
    same_dtype(OP, "codebooks", books, x, "x")
    same_device(OP, "codebooks", books, x, "x")
    if not 1 <= x.ndim <= 9 or x.shape[-1] != books.shape[-1]:
        fail(OP, "x", f"(…, D) = (…, {books.shape[-1]}) of at most 9 dimensions", tuple(x.shape))
