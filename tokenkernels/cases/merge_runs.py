"""The inputs that merge_runs is tried on, and the calls it refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._case import Bad, Case, Make


def _chain(t: Make, batch: int, length: int, channels: int) -> Tensor:
    """Tokens in runs around common directions: cosines of neighbours near 0.97 or near 0."""
    run = t.randint(0, 3, (batch, length)).eq(0).cumsum(1).clamp_max(length - 1)
    centre = t.randn(batch, length, channels, dtype=torch.float32).gather(
        1, run.unsqueeze(2).expand(-1, -1, channels)
    )
    return (centre + 0.15 * t.randn(batch, length, channels, dtype=torch.float32)).to(t.dtype)


def _simple(batch: int, length: int, channels: int, sized: bool = False, **options: Any) -> Any:
    def make(t: Make) -> dict[str, Any]:
        size = t.rand(batch, length, dtype=torch.float32) + 0.5 if sized else None
        return {"x": _chain(t, batch, length, channels), "threshold": 0.8, "size": size} | options

    return make


def _hard(t: Make) -> dict[str, Any]:
    x = torch.ones(4, 40, 24, device=t.device, dtype=t.dtype)
    x[0] = 0
    x[1, ::7] = torch.nan
    x[2, 20:] = -1
    return {"x": x, "threshold": 0.5, "max_run": 5}


def _zero_sizes(t: Make) -> dict[str, Any]:
    """Runs whose sizes are all zero, and some: no mean, and a mean of the others."""
    size = t.rand(2, 30, dtype=torch.float32) + 0.5
    size[0] = 0
    size[1, ::2] = 0
    return {"x": _chain(t, 2, 30, 40), "threshold": 0.8, "size": size}


def _strided(t: Make) -> dict[str, Any]:
    x = _chain(t, 3, 30, 64).reshape(3, 30, 2, 32).transpose(0, 1)[:, :, 1].transpose(0, 1)
    return {
        "x": x,
        "threshold": 0.8,
        "size": (t.rand(30, 3, dtype=torch.float32) + 1).T,
        "prefix": 2,
    }


HARD = ("test", "no-gradcheck", "no-opcheck")

CASES = [
    Case("ragged", _simple(3, 50, 19)),
    Case("size-prefix", _simple(2, 41, 33, sized=True, prefix=2)),
    Case("padded", _simple(2, 60, 70, padded=True)),
    Case("padded-size-prefix", _simple(3, 25, 16, sized=True, prefix=1, padded=True)),
    Case("max-run-2", _simple(2, 64, 8, max_run=2)),
    Case("max-run-1", _simple(2, 9, 8, max_run=1)),
    Case("all-merge", _simple(2, 33, 40, threshold=-1.0, max_run=1000)),
    Case("none-merge", _simple(2, 33, 40, threshold=1.1)),
    Case("one-token", _simple(3, 1, 5)),
    Case("all-prefix", _simple(2, 4, 5, prefix=4)),
    Case("zeros-nan-flip", _hard, HARD),
    Case("zero-sizes", _zero_sizes, HARD),
    Case("padded-max-run-size", _simple(3, 40, 11, True, padded=True, max_run=3, prefix=4)),
    Case("padded-hard", lambda t: _hard(t) | {"padded": True, "prefix": 3}, HARD),
    Case("strided", _strided),
    Case("vit 64x197x768", _simple(64, 197, 768, prefix=1), ("bench",)),
    Case("speech 8x1500x512", _simple(8, 1500, 512), ("bench",)),
    Case("text 2x8192x1024", _simple(2, 8192, 1024), ("bench",)),
    Case("text 2x8192x1024 padded", _simple(2, 8192, 1024, padded=True), ("bench",)),
]

BAD: list[Bad] = [
    (lambda kw: {"x": kw["x"][0]}, ValueError, "merge_runs: x: allowed 3 dimensions"),
    (lambda kw: {"x": kw["x"].long()}, TypeError, "merge_runs: x: allowed a tensor of float32"),
    (lambda kw: {"x": kw["x"].double()}, TypeError, 'backend="reference"'),
    (lambda kw: {"threshold": "0.8"}, TypeError, "merge_runs: threshold: allowed a number"),
    (lambda kw: {"max_run": 0}, ValueError, "merge_runs: max_run: allowed 1"),
    (lambda kw: {"max_run": 2.0}, TypeError, "merge_runs: max_run: allowed an int"),
    (lambda kw: {"prefix": -1}, ValueError, "merge_runs: prefix: allowed 0"),
    (lambda kw: {"prefix": 51}, ValueError, "merge_runs: prefix: allowed 0 … 50"),
    (lambda kw: {"padded": 1}, TypeError, "merge_runs: padded: allowed True, False"),
    (
        lambda kw: {"size": kw["x"][:, :, 0].double()},
        TypeError,
        "merge_runs: size: allowed a tensor of float32",
    ),
    (lambda kw: {"size": kw["x"][:, 1:, 0].float()}, ValueError, "merge_runs: size: allowed shape"),
]
