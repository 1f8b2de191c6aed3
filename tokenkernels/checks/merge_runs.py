"""What merge_runs refuses."""

from __future__ import annotations

from typing import Any

from . import NUMPY, dtype, fail, floating, integer, number, rank, same_device, shape

OP = "merge_runs"


def merge_runs(
    x: Any,
    threshold: Any,
    max_run: Any,
    size: Any,
    prefix: Any,
    padded: Any,
    backend: str | None = NUMPY,
) -> None:
    """Raises where an argument is off."""
    known = floating(OP, "x", x, backend)
    rank(OP, "x", x, 3)
    number(OP, "threshold", threshold)
    integer(OP, "max_run", max_run, 1)
    integer(OP, "prefix", prefix, 0)
    if prefix > x.shape[1]:
        fail(OP, "prefix", f"0 … {x.shape[1]} (tokens of x)", prefix)
    if not isinstance(padded, bool):
        fail(OP, "padded", "True, False", repr(padded), TypeError)
    if size is not None:
        dtype(OP, "size", size, ("float32", "float64") if known == "float64" else ("float32",))
        shape(OP, "size", size, x.shape[0], x.shape[1])
        same_device(OP, "size", size, x, "x")
