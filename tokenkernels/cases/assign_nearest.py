"""The inputs that assign_nearest is tried on, the calls it refuses, and what a call must cost."""

from __future__ import annotations

from typing import Any

import torch

from .._case import Bad, Case, Make


def _simple(shape: tuple[int, ...], codes: int, **options: Any) -> Any:
    def make(t: Make) -> dict[str, Any]:
        return {"x": t.randn(*shape), "codebook": t.randn(codes, shape[-1]), **options}

    return make


def _grouped(t: Make) -> dict[str, Any]:
    return {
        "x": t.randn(2, 9, 3, 20),
        "codebook": t.randn(3, 40, 20),
        "return_distance": True,
        "return_codes": True,
    }


def _grouped_by(metric: str) -> Any:
    return lambda t: _grouped(t) | {"metric": metric}


def _hard(metric: str, dim: int) -> Any:
    def make(t: Make) -> dict[str, Any]:
        codebook = t.randint(-2, 3, (90, dim)).to(t.dtype)
        codebook[60:80] = codebook[20:40]
        codebook[[0, 64], 0] = codebook.new_tensor([torch.nan, torch.inf])
        codebook[7] = 0
        x = codebook[t.randint(0, 90, (4, 20))].nan_to_num(1, 1) + t.randint(0, 2, (4, 20, dim)).to(
            t.dtype
        )
        x[0, 3, -1], x[1, 4, 0], x[2, 5] = torch.nan, -torch.inf, -0.0
        return {
            "x": x,
            "codebook": codebook,
            "metric": metric,
            "return_distance": True,
            "return_codes": True,
        }

    return make


def _far_from_the_origin(by: float, dim: int) -> Any:
    def make(t: Make) -> dict[str, Any]:
        return {
            "x": t.randn(3, 40, dim) + by,
            "codebook": t.randn(128, dim) + by,
            "return_distance": True,
        }

    return make


def _equal_codes(t: Make) -> dict[str, Any]:
    return {"x": t.randn(2, 20, 24), "codebook": t.randn(1, 24).expand(70, 24).contiguous()}


def _near_codes(t: Make) -> dict[str, Any]:
    """Too near each other to tell from 16 bits, and one so far that it hides all others."""
    codebook = t.randn(1, 24) + t.randn(70, 24) / 1024
    codebook[41] *= 1000
    return {"x": t.randn(2, 20, 24), "codebook": codebook, "return_distance": True}


def _positive(metric: str) -> Any:
    def make(t: Make) -> dict[str, Any]:
        return {
            "x": t.rand(2, 50, 512),
            "codebook": t.rand(300, 512),
            "metric": metric,
            "return_distance": True,
        }

    return make


def _tiny_codes(t: Make) -> dict[str, Any]:
    return {"x": t.randn(2, 30, 32), "codebook": (t.rand(700, 32) * 2 - 1) / 4096}


def _channels_first(t: Make) -> dict[str, Any]:
    return {
        "x": t.randn(2, 12, 1, 19).permute(0, 2, 3, 1),
        "codebook": t.randn(65, 12),
        "return_codes": True,
    }


def _many_strides(t: Make) -> dict[str, Any]:
    return {
        "x": t.randn(3, 4, 3, 4, 3, 10)[::2, 1:, :2, ::3, 1:],
        "codebook": t.randn(2, 33, 10)[:, ::2],
    }


def _empty_poison(t: Make) -> dict[str, Any]:
    codebook = t.randn(5, 3) * torch.nan
    return {"x": t.randn(2, 4, 3), "codebook": codebook, "return_distance": True}


def _bench(rows: int, codes: int, dim: int, **options: Any) -> Case:
    words = [str(v) if isinstance(v, str) else name for name, v in options.items()]
    name = " ".join([f"{rows}x{codes}x{dim}", *words])
    return Case(name, _simple((rows, dim), codes, **options), ("bench",))


def cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    x, codebook = kwargs["x"], kwargs["codebook"]
    rows = x.numel() / x.shape[-1]
    moved = (x.numel() + codebook.numel()) * x.element_size() + 8 * rows
    moved += 4 * rows * kwargs.get("return_distance", False)
    moved += 2 * x.numel() * x.element_size() * kwargs.get("return_codes", False)
    return moved, 2 * x.numel() * codebook.shape[-2]


CASES = [
    Case("l2", _simple((2, 37, 8), 150)),
    Case(
        "cosine",
        _simple((2, 37, 12), 100, metric="cosine", return_distance=True, return_codes=True),
    ),
    Case("dot", _simple((3, 11, 5), 64, metric="dot", return_distance=True)),
    Case("one-dimension", _simple((7, 1), 30, return_distance=True)),
    Case("one-code", _simple((3, 4, 17), 1, return_codes=True)),
    Case("wide", _simple((1, 23, 70), 131, return_distance=True)),
    Case("wide-cosine", _simple((2, 9, 130), 66, metric="cosine", return_distance=True)),
    Case("wide-codes", _simple((6, 257), 80, return_codes=True, return_distance=True)),
    Case("many-codes", _simple((5, 16), 3000)),
    Case("many-tiles", _simple((260, 200), 300)),
    Case("grouped", _grouped),
    Case("grouped-cosine", _grouped_by("cosine")),
    Case("grouped-dot", _grouped_by("dot")),
    Case("ties-nan-inf", _hard("l2", 6), ("test", "no-opcheck")),
    Case("ties-nan-inf-wide", _hard("l2", 20), ("test", "no-opcheck")),
    Case("ties-nan-inf-cosine", _hard("cosine", 6), ("test", "no-opcheck")),
    Case("ties-nan-inf-dot", _hard("dot", 6), ("test", "no-opcheck")),
    Case("offset", _far_from_the_origin(1000, 24)),
    Case("offset-ten", _far_from_the_origin(10, 9)),
    Case("equal-codes", _equal_codes),
    Case("near-codes", _near_codes),
    Case("positive-dot", _positive("dot")),
    Case("positive-cosine", _positive("cosine")),
    Case("tiny-codes", _tiny_codes),
    Case("channels-first", _channels_first),
    Case("many-strides", _many_strides),
    Case("no-usable-code", _empty_poison, ("test", "no-opcheck")),
    Case("one-token", _simple((33,), 40, return_distance=True), ("test", "coupled")),
    _bench(8192, 4096, 12),
    _bench(8192, 4096, 12, metric="cosine"),
    _bench(8192, 16384, 8),
    _bench(6000, 1024, 8),
    _bench(4096, 1024, 256),
    _bench(6000, 1024, 128),
    _bench(2048, 16384, 256),
]

BAD: list[Bad] = [
    (
        lambda kw: {"metric": "l1"},
        ValueError,
        "assign_nearest: metric: allowed 'l2', 'cosine', 'dot', got 'l1'",
    ),
    (lambda kw: {"x": kw["x"].long()}, TypeError, "assign_nearest: x: allowed a tensor of float32"),
    (lambda kw: {"x": kw["x"].double()}, TypeError, 'backend="reference"'),
    (
        lambda kw: {"x": kw["x"][..., :7]},
        ValueError,
        r"assign_nearest: x: allowed \(…, D\) = \(…, 8\)",
    ),
    (lambda kw: {"x": kw["x"][0, 0, 0]}, ValueError, "assign_nearest: x: allowed"),
    (
        lambda kw: {"codebook": kw["codebook"].half()},
        TypeError,
        "assign_nearest: codebook: allowed the dtype of x",
    ),
    (
        lambda kw: {"codebook": kw["codebook"][:0]},
        ValueError,
        "assign_nearest: codebook: allowed K of 1",
    ),
    (
        lambda kw: {"codebook": kw["codebook"][0]},
        ValueError,
        "assign_nearest: codebook: allowed 2 or 3 dim",
    ),
    (
        lambda kw: {"codebook": kw["codebook"][None]},
        ValueError,
        r"assign_nearest: x: allowed \(…, G, D\)",
    ),
    (lambda kw: {"codebook": None}, TypeError, "assign_nearest: codebook: allowed a tensor"),
    (
        lambda kw: {"return_codes": 1},
        TypeError,
        "assign_nearest: return_codes: allowed True, False, got int 1",
    ),
]
