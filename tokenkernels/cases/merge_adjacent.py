"""The inputs that merge_adjacent is tried on, and the calls it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .._case import Bad, Case, Make


def _alike(
    t: Make, images: int, grid: Sequence[int], window: Sequence[int], channels: int, prefix: int = 0
) -> Tensor:
    """Windows of one direction and noise, little or much: similarities spread over 0.3 … 1."""
    spread = [-(-extent // step) for extent, step in zip(grid, window, strict=True)]
    common = t.randn(images, *spread, channels, dtype=torch.float32)
    level = 0.1 + 1.4 * t.rand(images, *spread, 1, dtype=torch.float32)
    for axis, (extent, step) in enumerate(zip(grid, window, strict=True), 1):
        common = common.repeat_interleave(step, axis).narrow(axis, 0, extent)
        level = level.repeat_interleave(step, axis).narrow(axis, 0, extent)
    x = t.randn(images, prefix + prod(grid), channels, dtype=torch.float32)
    x[:, prefix:] = common.flatten(1, -2) + level.flatten(1, -2) * x[:, prefix:]
    return x.to(t.dtype)


def _simple(
    images: int,
    grid: tuple[int, ...],
    window: tuple[int, ...],
    channels: int,
    sized: bool = False,
    **options: Any,
) -> Any:
    prefix = options.get("prefix", 0)

    def make(t: Make) -> dict[str, Any]:
        x = _alike(t, images, grid, window, channels, prefix)
        size = t.rand(images, x.shape[1], dtype=torch.float32) + 0.5 if sized else None
        return {"x": x, "grid": grid, "window": window, "size": size} | options

    return make


def _hard(**options: Any) -> Any:
    """Images of equal, zero, NaN and opposite tokens, and of signed zeros as similarities."""

    def make(t: Make) -> dict[str, Any]:
        x = torch.ones(5, 36, 24, device=t.device, dtype=t.dtype)
        x[1] = 0
        x[2, ::5] = torch.nan
        x[3, ::2] = -1
        x[4] = t.randn(36, 24)
        return {"x": x, "grid": (6, 6), "window": (2, 2)} | options

    return make


def _zero_sizes(t: Make) -> dict[str, Any]:
    """Windows whose sizes are all zero, and some: no mean, and a mean of the others."""
    x = _alike(t, 2, (4, 6), (2, 2), 40)
    size = t.rand(2, 24, dtype=torch.float32) + 0.5
    size[0] = 0
    size[1, ::2] = 0
    return {"x": x, "grid": (4, 6), "window": (2, 2), "num_windows": 4, "size": size}


def _strided(t: Make) -> dict[str, Any]:
    x = _alike(t, 3, (4, 7), (2, 3), 64, 1)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)[:, :, 8:41]
    size = (t.rand(29, 3, dtype=torch.float32) + 1).T
    return {"x": x, "grid": (4, 7), "window": (2, 3), "threshold": 0.6, "size": size, "prefix": 1}


COUPLED = ("test", "coupled")
HARD = ("test", "no-gradcheck", "no-opcheck")

CASES = [
    Case("image", _simple(3, (8, 8), (2, 2), 19, threshold=0.6)),
    Case(
        "image-edges-prefix-size",
        _simple(2, (7, 8), (3, 3), 33, threshold=0.5, prefix=2, sized=True),
    ),
    Case("sequence", _simple(2, (25,), (3,), 16, threshold=0.6, prefix=1)),
    Case("video", _simple(2, (3, 5, 4), (2, 2, 2), 40, threshold=0.5, sized=True)),
    Case("frames-only", _simple(2, (4, 3, 3), (2, 1, 1), 8, threshold=0.6)),
    Case("columns", _simple(2, (4, 6), (1, 2), 8, threshold=0.6, order="similarity")),
    Case("rows", _simple(2, (6, 4), (2, 1), 70, threshold=0.6)),
    Case("window-beyond-grid", _simple(2, (3, 4), (4, 2), 8, threshold=0.0)),
    Case(
        "similarity-order",
        _simple(3, (8, 8), (2, 2), 12, threshold=0.6, order="similarity", prefix=1),
    ),
    Case(
        "uniform", _simple(3, (9, 9), (3, 3), 24, threshold=0.6, batch="uniform", prefix=1), COUPLED
    ),
    Case(
        "mustdrop",
        _simple(
            3, (9, 9), (3, 3), 24, threshold=0.6, batch="uniform", prefix=1, order="similarity"
        ),
        COUPLED,
    ),
    Case(
        "uniform-size",
        _simple(3, (6, 7), (2, 2), 17, True, threshold=0.6, batch="uniform", prefix=2),
        COUPLED,
    ),
    Case(
        "uniform-video-similarity-size",
        _simple(
            2, (3, 4, 5), (2, 2, 2), 9, True, threshold=0.5, batch="uniform", order="similarity"
        ),
        COUPLED,
    ),
    Case("uniform-num-windows", _simple(2, (6, 6), (3, 2), 8, num_windows=4, batch="uniform")),
    Case(
        "video-similarity-size-prefix",
        _simple(2, (4, 3, 4), (2, 1, 2), 21, True, threshold=0.6, order="similarity", prefix=3),
    ),
    Case(
        "num-windows-each-size",
        _simple(3, (23,), (2,), 13, True, num_windows=[0, 11, 4], order="similarity", prefix=2),
    ),
    Case("num-windows", _simple(3, (8, 10), (2, 2), 20, num_windows=7, sized=True)),
    Case(
        "num-windows-similarity",
        _simple(3, (8, 10), (2, 2), 20, num_windows=13, prefix=1, order="similarity"),
    ),
    Case("num-windows-none", _simple(2, (4, 4), (2, 2), 6, num_windows=0)),
    Case("num-windows-each", _simple(3, (8, 8), (2, 2), 9, num_windows=[3, 0, 16], prefix=1)),
    Case(
        "num-windows-each-similarity",
        _simple(2, (8, 8), (2, 2), 9, num_windows=[5, 9], order="similarity"),
    ),
    Case("hard-threshold", _hard(threshold=0.0), HARD),
    Case("hard-ranked", _hard(num_windows=7, order="similarity"), HARD),
    Case("hard-all", _hard(num_windows=9), HARD),
    Case("zero-sizes", _zero_sizes, HARD),
    Case("strided", _strided),
    Case(
        "mustdrop 8x24x24x1024 3x3", _simple(8, (24, 24), (3, 3), 1024, threshold=0.8), ("bench",)
    ),
    Case(
        "mustdrop 8x24x24x1024 3x3 uniform",
        _simple(
            8, (24, 24), (3, 3), 1024, threshold=0.8, prefix=1, batch="uniform", order="similarity"
        ),
        ("bench",),
    ),
    Case("image 8x24x24x1024 2x2", _simple(8, (24, 24), (2, 2), 1024, threshold=0.6), ("bench",)),
    Case(
        "vit 64x14x14x768 2x2",
        _simple(64, (14, 14), (2, 2), 768, threshold=0.6, prefix=1),
        ("bench",),
    ),
    Case(
        "vit 64x14x14x768 2x2 r=24",
        _simple(64, (14, 14), (2, 2), 768, num_windows=24, prefix=1),
        ("bench",),
    ),
]

BAD: list[Bad] = [
    (lambda kw: {"x": kw["x"][0]}, ValueError, "merge_adjacent: x: allowed 3 dimensions"),
    (lambda kw: {"x": kw["x"].long()}, TypeError, "merge_adjacent: x: allowed a tensor of float32"),
    (lambda kw: {"x": kw["x"].double()}, TypeError, 'backend="reference"'),
    (lambda kw: {"x": kw["x"][:, 1:]}, ValueError, "merge_adjacent: x: allowed .* = 64 for grid"),
    (lambda kw: {"prefix": 1}, ValueError, "merge_adjacent: x: allowed"),
    (lambda kw: {"prefix": -1}, ValueError, "merge_adjacent: prefix: allowed 0"),
    (lambda kw: {"grid": 64}, TypeError, "merge_adjacent: grid: allowed 1, 2 or 3 ints"),
    (lambda kw: {"grid": (2, 2, 4, 4)}, ValueError, "merge_adjacent: grid: allowed 1, 2 or 3 ints"),
    (lambda kw: {"grid": (64,)}, ValueError, "merge_adjacent: window: allowed as many entries"),
    (lambda kw: {"grid": (8, -8)}, ValueError, "merge_adjacent: grid: allowed 1"),
    (lambda kw: {"window": (2, 0)}, ValueError, "merge_adjacent: window: allowed 1"),
    (lambda kw: {"window": (2, 1.5)}, TypeError, "merge_adjacent: window: allowed an int"),
    (
        lambda kw: {"window": (1, 1)},
        ValueError,
        "merge_adjacent: window: allowed at least 2 tokens",
    ),
    (lambda kw: {"threshold": None}, ValueError, "exactly one"),
    (lambda kw: {"num_windows": 3}, ValueError, "exactly one"),
    (lambda kw: {"threshold": "0.6"}, TypeError, "merge_adjacent: threshold: allowed a number"),
    (
        lambda kw: {"threshold": None, "num_windows": 17},
        ValueError,
        "merge_adjacent: num_windows: allowed 0 … 16",
    ),
    (
        lambda kw: {"threshold": None, "num_windows": [1, 2]},
        ValueError,
        "num_windows: allowed an int, or 3 ints",
    ),
    (lambda kw: {"threshold": None, "num_windows": 2.0}, TypeError, "num_windows: allowed an int"),
    (
        lambda kw: {"threshold": None, "num_windows": [1] * 3, "batch": "uniform"},
        ValueError,
        "allowed one int",
    ),
    (
        lambda kw: {"size": kw["x"][:, :, 0].double()},
        TypeError,
        "merge_adjacent: size: allowed a tensor of float32",
    ),
    (
        lambda kw: {"size": kw["x"][:, 1:, 0].float()},
        ValueError,
        "merge_adjacent: size: allowed shape",
    ),
    (
        lambda kw: {"order": "random"},
        ValueError,
        "merge_adjacent: order: allowed 'raster', 'similarity'",
    ),
    (
        lambda kw: {"batch": "dense"},
        ValueError,
        "merge_adjacent: batch: allowed 'ragged', 'uniform'",
    ),
]
