"""The inputs that assign_residual is tried on, the calls it refuses, and what a call must cost."""

from __future__ import annotations

from typing import Any

import torch

from .._case import Bad, Case, Make


def _simple(shape: tuple[int, ...], rounds: int, codes: int) -> Any:
    def make(t: Make) -> dict[str, Any]:
        scales = 0.5 ** torch.arange(rounds, device=t.device).float()[:, None, None]
        books = (t.randn(rounds, codes, shape[-1]) * scales).to(t.dtype)
        return {"x": t.randn(*shape), "codebooks": books}

    return make


def _hard(t: Make) -> dict[str, Any]:
    books = t.randint(-2, 3, (3, 70, 5)).to(t.dtype)
    books[:, 40:60] = books[:, 20:40]
    books[:, 0, 1] = torch.nan
    books[2] = torch.inf
    x = t.randint(-3, 4, (4, 9, 5)).to(t.dtype)
    x[1, 2, 3], x[2, 2, 0] = torch.nan, torch.inf
    return {"x": x, "codebooks": books}


def _equal_codes(t: Make) -> dict[str, Any]:
    """After the first round all codes are one, or as near as makes no difference to 16 bits."""
    books = t.randn(3, 1, 24).expand(3, 70, 24).contiguous()
    books[0] = t.randn(70, 24)
    books[2] += t.randn(70, 24) / 1024
    books[2, 41] *= 1000
    return {"x": t.randn(2, 20, 24), "codebooks": books}


def _strided(t: Make) -> dict[str, Any]:
    return {
        "x": t.randn(2, 24, 3, 7).permute(0, 3, 2, 1)[:, 1::2],
        "codebooks": t.randn(33, 4, 24).transpose(0, 1),
    }


def cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    x, books = kwargs["x"], kwargs["codebooks"]
    rows = x.numel() / x.shape[-1]
    moved = (2 * x.numel() + books.numel()) * x.element_size() + 8 * rows * books.shape[0]
    return moved, 2 * rows * books.numel()


CASES = [
    Case("narrow", _simple((2, 40, 8), 4, 100)),
    Case("wide", _simple((3, 17, 32), 3, 70)),
    Case("runs", _simple((2, 3, 150), 2, 20)),
    Case("one-round", _simple((6, 12), 1, 50)),
    Case("one-token", _simple((9,), 3, 30), ("test", "coupled")),
    Case("ties-nan-inf", _hard, ("test", "no-opcheck")),
    Case("equal-codes", _equal_codes),
    Case("strided", _strided),
    Case("encodec 6000x8x1024x128", _simple((6000, 128), 8, 1024), ("bench",)),
    Case("dac 8192x9x1024x8", _simple((8192, 8), 9, 1024), ("bench",)),
]

BAD: list[Bad] = [
    (lambda kw: {"x": kw["x"].int()}, TypeError, "assign_residual: x: allowed a tensor of float32"),
    (lambda kw: {"x": kw["x"][..., 1:]}, ValueError, "assign_residual: x: allowed"),
    (
        lambda kw: {"x": kw["x"].double(), "codebooks": kw["codebooks"].double()},
        TypeError,
        'backend="reference"',
    ),
    (
        lambda kw: {"codebooks": kw["codebooks"][0]},
        ValueError,
        "assign_residual: codebooks: allowed 3 dim",
    ),
    (
        lambda kw: {"codebooks": kw["codebooks"][:0]},
        ValueError,
        "assign_residual: codebooks: allowed K of 1",
    ),
    (
        lambda kw: {"codebooks": kw["codebooks"].half()},
        TypeError,
        "assign_residual: codebooks: allowed the dtype of x",
    ),
]
