"""What merge_adjacent refuses, and the one form its grid, window and counts take."""

from __future__ import annotations

from typing import Any

from . import NUMPY, choice, dtype, fail, floating, integer, number, rank, same_device, shape

OP = "merge_adjacent"


def merge_adjacent(
    x: Any,
    grid: Any,
    window: Any,
    threshold: Any,
    num_windows: Any,
    size: Any,
    prefix: Any,
    order: Any,
    batch: Any,
    backend: str | None = NUMPY,
) -> list[int] | None:
    """Raises where an argument is off; returns how many windows merge: one int, one per image, or
    None with a threshold.
    """
    known = floating(OP, "x", x, backend)
    rank(OP, "x", x, 3)
    integer(OP, "prefix", prefix, 0)
    _extents("grid", grid)
    _extents("window", window)
    if len(grid) != len(window):
        fail(OP, "window", f"as many entries as grid ({len(grid)})", len(window))
    cells = windows = members = 1
    for extent, step in zip(grid, window, strict=True):
        cells *= extent
        windows *= extent // step
        members *= step
    tokens = prefix + cells
    if members < 2:
        fail(OP, "window", "at least 2 tokens", tuple(window))
    images, length, _ = x.shape
    if length != tokens:
        fail(OP, "x", f"(B, P+N, C) with P+N = {tokens} for grid {tuple(grid)}", tuple(x.shape))
    if size is not None:
        dtype(OP, "size", size, ("float32", "float64") if known == "float64" else ("float32",))
        shape(OP, "size", size, images, tokens)
        same_device(OP, "size", size, x, "x")
    choice(OP, "order", order, "raster", "similarity")
    choice(OP, "batch", batch, "ragged", "uniform")
    if (threshold is None) == (num_windows is None):
        fail(
            OP,
            "threshold, num_windows",
            "exactly one of the two",
            f"threshold={threshold}, num_windows={num_windows}",
        )
    if num_windows is None:
        number(OP, "threshold", threshold)
        return None
    return _counts(num_windows, images, windows, batch)


def _extents(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)):
        fail(OP, name, "1, 2 or 3 ints", f"{type(value).__name__} {value!r:.60}", TypeError)
    if not 1 <= len(value) <= 3:
        fail(OP, name, "1, 2 or 3 ints", f"{len(value)}")
    for extent in value:
        if type(extent) is not int or not 1 <= extent <= 2**62:
            integer(OP, name, extent, 1)


def _counts(num_windows: Any, images: int, windows: int, batch: str) -> list[int]:
    if isinstance(num_windows, int):
        integer(OP, "num_windows", num_windows, 0, windows)
        return [num_windows]
    if hasattr(num_windows, "tolist") and getattr(num_windows, "ndim", 0) == 1:
        dtype(OP, "num_windows", num_windows, ("int64", "int32"))
        num_windows = num_windows.tolist()
    if not isinstance(num_windows, (list, tuple)):
        integer(OP, "num_windows", num_windows, 0, windows)
        return [int(num_windows)]
    if batch == "uniform":
        fail(OP, "num_windows", 'one int with batch="uniform"', f"{len(num_windows)} ints")
    if len(num_windows) != images:
        fail(
            OP,
            "num_windows",
            f"an int, or {images} ints (one per image)",
            f"{len(num_windows)} ints",
        )
    for count in num_windows:
        integer(OP, "num_windows", count, 0, windows)
    return [count if isinstance(count, int) else int(count) for count in num_windows] or [0]
