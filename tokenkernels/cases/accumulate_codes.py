"""The inputs that accumulate_codes is tried on, the calls it refuses, and what a call must cost."""

from __future__ import annotations

from typing import Any

from .._case import Bad, BadValues, Case, Make


def _simple(shape: tuple[int, ...], codes: int, low: int = 0, **options: Any) -> Any:
    def make(t: Make) -> dict[str, Any]:
        index = t.randint(low, codes, shape[:-1])
        return {"x": t.randn(*shape), "index": index, "K": codes} | options

    return make


def _one_code(t: Make) -> dict[str, Any]:
    return {"x": t.rand(700, 9), "index": t.randint(3, 4, (700,)), "K": 5}


def _nearly_one_code(t: Make) -> dict[str, Any]:
    """One code has so many rows that a GPU adds them up in pieces."""
    index = t.randint(0, 100, (2500,)).clamp(max=3)
    return {"x": t.rand(2500, 150), "index": index, "K": 6}


def _strided(t: Make) -> dict[str, Any]:
    return {
        "x": t.randn(2, 12, 3, 19).permute(0, 2, 3, 1),
        "index": t.randint(0, 8, (3, 2, 19)).transpose(0, 1),
        "K": 8,
    }


def _grouped_strided(t: Make) -> dict[str, Any]:
    return _strided(t) | {
        "index": t.randint(-1, 8, (3, 19, 2)).permute(2, 0, 1),
        "grouped": True,
    }


def cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    x, index, codes = kwargs["x"], kwargs["index"], kwargs["K"]
    groups = x.shape[-2] if kwargs.get("grouped") else 1
    moved = (
        x.numel() * x.element_size() + 8 * index.numel() + groups * codes * (4 * x.shape[-1] + 8)
    )
    return moved, x.numel()


CASES = [
    Case("some", _simple((3, 40, 12), 10)),
    Case("masked", _simple((4, 25, 8), 7, low=-1)),
    Case("wide", _simple((50, 300), 9)),
    Case("grouped", _simple((2, 15, 3, 16), 6, low=-1, grouped=True)),
    Case("one-code", _one_code),
    Case("nearly-one-code", _nearly_one_code),
    Case("more-codes-than-tokens", _simple((5, 3), 1000)),
    Case("no-tokens", _simple((0, 4), 6)),
    Case("strided", _strided),
    Case("grouped-strided", _grouped_strided),
    Case("8192x4096x12", _simple((8192, 12), 4096), ("bench",)),
    Case("4096x1024x256", _simple((4096, 256), 1024), ("bench",)),
    Case("6000x1024x128", _simple((6000, 128), 1024), ("bench",)),
]

BAD: list[Bad] = [
    (lambda kw: {"K": 0}, ValueError, "accumulate_codes: K: allowed 1"),
    (lambda kw: {"K": 2.0}, TypeError, "accumulate_codes: K: allowed an int"),
    (
        lambda kw: {"index": kw["index"][1:]},
        ValueError,
        "accumulate_codes: index: allowed the shape",
    ),
    (
        lambda kw: {"index": kw["x"][..., 0]},
        TypeError,
        "accumulate_codes: index: allowed a tensor of int64",
    ),
    (
        lambda kw: {"x": kw["x"].long()},
        TypeError,
        "accumulate_codes: x: allowed a tensor of float32",
    ),
    (lambda kw: {"x": kw["x"].double()}, TypeError, 'backend="reference"'),
    (lambda kw: {"grouped": 1}, TypeError, "accumulate_codes: grouped: allowed True, False"),
]

_REFUSED = "accumulate_codes: index: allowed -1"
BAD_VALUES = [
    BadValues(
        lambda kw: {"K": 3},
        _REFUSED,
        lambda kw: {"K": 3, "index": kw["index"].where(kw["index"] < 3, -1)},
    ),
    BadValues(
        lambda kw: {"index": kw["index"] - 2},
        _REFUSED,
        lambda kw: {"index": (kw["index"] - 2).clamp(min=-1)},
    ),
    BadValues(
        lambda kw: {"index": kw["index"] + 2**40 * (kw["index"] % 2)},
        _REFUSED,
        lambda kw: {"index": kw["index"].where(kw["index"] % 2 == 0, -1)},
    ),
]
