"""The inputs that gather_topk is tried on, the calls it refuses, and what a call must cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._case import Bad, Case, Make


def _simple(batch: int, tokens: int, channels: int, prefix: int = 0, **options: Any) -> Any:
    def make(t: Make) -> dict[str, Any]:
        return {
            "x": t.randn(batch, prefix + tokens, channels),
            "scores": t.rand(batch, tokens),
            "prefix": prefix,
        } | options

    return make


def _tuple(t: Make) -> dict[str, Any]:
    hidden, scores = t.randn(2, 21, 12), t.randn(2, 20, dtype=torch.float32)
    positions, sizes = (
        torch.arange(42, device=t.device).reshape(2, 21),
        t.rand(2, 21, dtype=torch.float32),
    )
    return {
        "x": (hidden, positions, sizes),
        "scores": scores,
        "k": [3, 20],
        "prefix": 1,
        "order": "score",
    }


def _kept(k: int) -> Any:
    def make(t: Make) -> dict[str, Any]:
        return {
            "x": t.randn(3, 33, 5),
            "scores": t.randn(3, 33),
            "k": k,
            "keep": t.bool(0.3, (3, 33)),
            "fuse": "sum",
        }

    return make


def _with_keep(*sizes: int, **options: Any) -> Any:
    def make(t: Make) -> dict[str, Any]:
        kwargs = _simple(*sizes, **options)(t)
        return kwargs | {"keep": t.bool(0.3, kwargs["scores"].shape)}

    return make


def _fused_pair(t: Make) -> dict[str, Any]:
    """Two tensors, one without channels, and scores that add up to nothing in one image."""
    scores = t.rand(3, 20)
    scores[1] = 0
    x = (t.randn(3, 21, 12), t.rand(3, 21))
    return {"x": x, "scores": scores, "k": [3, 0, 20], "prefix": 1, "fuse": "mean"}


def _hard_scores(t: Make) -> dict[str, Any]:
    scores = t.randint(-2, 3, (4, 70)).to(t.dtype)
    scores[0] = 0.0
    scores[1, ::3] = torch.nan
    scores[2, ::2] = -torch.inf
    scores[3, ::5] = -0.0
    return {"x": t.randn(4, 70, 3), "scores": scores, "k": 41, "order": "score"}


def _near_threshold(t: Make) -> dict[str, Any]:
    """Scores below the threshold that equal it once it is rounded to bfloat16 or float16."""
    scores = t.rand(2, 50)
    scores[:, ::4] = 153 / 256
    return {"x": t.randn(2, 50, 7), "scores": scores, "threshold": 153 / 256 + 1e-4}


def _long(batch: int, tokens: int, levels: int, **options: Any) -> Any:
    """So many tokens that several blocks of a GPU select together, with few different scores."""

    def make(t: Make) -> dict[str, Any]:
        scores = t.randint(0, levels, (batch, tokens)).to(t.dtype) / levels
        return {"x": t.randn(batch, tokens, 1), "scores": scores} | options

    return make


def _long_kept(t: Make) -> dict[str, Any]:
    kwargs = _long(1, 17001, 1000, k=300, fuse="sum")(t)
    return kwargs | {"keep": t.bool(0.01, (1, 17001))}


def _strided(t: Make) -> dict[str, Any]:
    return {
        "x": t.randn(20, 3, 2, 8).transpose(0, 1)[:, :, 1],
        "scores": t.rand(20, 3).T,
        "k": 7,
        "fuse": "mean",
    }


def _bench(batch: int, tokens: int, channels: int, k: int) -> Any:
    def make(t: Make) -> dict[str, Any]:
        return {
            "x": t.randn(batch, tokens, channels),
            "scores": t.randn(batch, tokens).softmax(-1),
            "k": k,
        }

    return make


def cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    x = (kwargs["x"],) if isinstance(kwargs["x"], Tensor) else kwargs["x"]
    scores, k = kwargs["scores"], kwargs.get("k")
    batch, tokens = scores.shape
    chosen = k * batch if isinstance(k, int) else sum(k) if k is not None else batch * tokens
    rows = chosen + batch * kwargs.get("prefix", 0)
    moved = sum(2 * rows * t.element_size() * t[0, 0].numel() for t in x)
    fused = bool(kwargs.get("fuse")) * sum(
        (batch * tokens - chosen) * t.element_size() * t[0, 0].numel() for t in x
    )
    return moved + fused + scores.numel() * scores.element_size(), 0


def launches(kwargs: dict[str, Any]) -> tuple[int, int]:
    """One up to 8192 tokens, or 1024 that are ranked; one more for a threshold or a fused token,
    and for every 16 budgets of single images.
    """
    (batch, tokens), k, fuse = kwargs["scores"].shape, kwargs.get("k"), bool(kwargs.get("fuse"))
    ranked = kwargs.get("order") == "score" and tokens > 1024
    budgets = 0 if k is None or isinstance(k, int) else -(-batch // 16)
    selecting = 2 if tokens > 8192 or ranked else 1
    return selecting + (k is None) + fuse + budgets, 1 + fuse


_LONG_TAGS = ("test", "no-gradcheck", "long")

CASES = [
    Case("k", _simple(3, 37, 19, k=11)),
    Case("k-all-prefix", _simple(2, 16, 8, prefix=2, k=16)),
    Case("k-none", _simple(2, 9, 4, prefix=1, k=0)),
    Case("score-order", _simple(2, 40, 16, k=13, order="score")),
    Case("ragged", _simple(3, 24, 6, prefix=1, k=[5, 0, 24])),
    Case("threshold", _simple(3, 50, 7, prefix=1, threshold=0.6)),
    Case("threshold-near", _near_threshold),
    Case("threshold-fuse", _simple(2, 50, 33, threshold=0.5, order="score", fuse="mean")),
    Case("fuse-sum", _simple(2, 30, 70, prefix=1, k=9, fuse="sum")),
    Case("fuse-mean", _simple(2, 30, 18, k=30, fuse="mean")),
    Case("tuple", _tuple),
    Case("keep-few", _kept(20)),
    Case("keep-many", _kept(4)),
    Case("keep-threshold", _with_keep(3, 37, 6, 1, threshold=0.7)),
    Case("keep-threshold-fuse", _with_keep(2, 30, 9, threshold=0.9, order="score", fuse="sum")),
    Case("keep-score-order", _with_keep(3, 33, 5, 2, k=12, order="score")),
    Case("keep-ragged-fuse", _with_keep(3, 26, 7, 1, k=[4, 26, 0], order="score", fuse="sum")),
    Case("tuple-ragged-fuse", _fused_pair, ("test", "no-gradcheck")),
    Case("ties-nan-inf", _hard_scores, ("test", "no-gradcheck")),
    Case("strided", _strided),
    Case("long-ties", _long(2, 8500, 3, k=4000), _LONG_TAGS),
    Case("long-equal", _long(1, 17001, 1, k=9001), _LONG_TAGS),
    Case("long-score-order", _long(1, 33000, 900, k=9001, order="score"), _LONG_TAGS),
    Case("long-threshold", _long(2, 9001, 50, threshold=0.91), _LONG_TAGS),
    Case("long-keep-fuse", _long_kept, _LONG_TAGS),
    Case("evit 128x196x768 k=137", _bench(128, 196, 768, 137), ("bench",)),
    Case("visionzip 16x576x1024 k=64", _bench(16, 576, 1024, 64), ("bench",)),
    Case("next 4x2880x4096 k=320", _bench(4, 2880, 4096, 320), ("bench",)),
    Case("video 1x32768x3584 k=8192", _bench(1, 32768, 3584, 8192), ("bench",)),
]


def _gradient(
    tokens: int,
    kept: list[int],
    channels: int,
    prefix: int = 0,
    fuse: str = "",
    packed: bool = False,
    **options: Any,
) -> Any:
    """The gradient of what images kept: of two tensors, the second without channels."""

    def make(t: Make) -> dict[str, Any]:
        batch, extra = len(kept), prefix + bool(fuse)
        index = [t.permutation(tokens)[:count] for count in kept]
        ends = torch.tensor([0, *(extra + count for count in kept)], device=t.device).cumsum(0)
        chosen = torch.cat([ends[:0], *index])
        rows = (int(ends[-1]),) if packed else (batch, extra + kept[0])
        x = [t.randn(batch, prefix + tokens, channels), t.randn(batch, prefix + tokens)]
        return {
            "gradients": [t.randn(*rows, channels), t.randn(*rows)],
            "index": chosen if packed else chosen.view(batch, kept[0]),
            "offsets": ends,
            "tensors": x if fuse else [],
            "scores": t.rand(batch, tokens),
            "prefix": prefix,
            "fuse": fuse,
        } | {name: value(t) for name, value in options.items()}

    return make


def _apart(t: Make) -> Tensor:
    """Scores (2, 17) whose tokens lie apart."""
    return t.rand(17, 4)[:, ::2].T


BACKWARD_CASES = [
    Case("dense", _gradient(19, [7, 7, 7], 21, 2)),
    Case("packed", _gradient(24, [5, 0, 24], 6, 1, packed=True)),
    Case("nothing-kept", _gradient(9, [0, 0], 5)),
    Case("nothing-kept-sum", _gradient(9, [0, 0], 33, 1, "sum")),
    Case("one-token", _gradient(1, [1, 0], 3, 1, "sum", packed=True)),
    Case("all-kept-mean", _gradient(12, [12, 12], 4, fuse="mean")),
    Case("sum-packed", _gradient(30, [9, 30, 0], 70, fuse="sum", packed=True)),
    Case("mean", _gradient(17, [4, 4], 18, 1, "mean", scores=_apart)),
    Case("no-weight-mean", _gradient(15, [3, 3], 8, 1, "mean", scores=lambda t: 0 * t.rand(2, 15))),
    Case("no-image-sum", _gradient(6, [], 4, 1, "sum", packed=True)),
]  # fmt: skip


def backward_length(kwargs: dict[str, Any]) -> int:
    """A score's gradient: a product over the channels, less the mean of those of all tokens."""
    gradients = kwargs["gradients"]
    return kwargs["scores"].shape[1] + gradients[0].shape[-1] if kwargs["fuse"] else 1


BAD: list[Bad] = [
    (lambda kw: {"k": -1}, ValueError, "gather_topk: k: allowed 0"),
    (lambda kw: {"k": 38}, ValueError, "gather_topk: k: allowed 0"),
    (lambda kw: {"k": 2.5}, TypeError, "gather_topk: k: allowed an int"),
    (lambda kw: {"k": [1, 2]}, ValueError, "gather_topk: k: allowed an int, or 3 ints"),
    (lambda kw: {"k": None}, ValueError, "exactly one"),
    (lambda kw: {"threshold": 0.5}, ValueError, "exactly one"),
    (lambda kw: {"x": kw["x"][0]}, ValueError, "gather_topk: x: allowed"),
    (lambda kw: {"x": ()}, ValueError, "gather_topk: x: allowed 1"),
    (
        lambda kw: {"scores": kw["scores"].long()},
        TypeError,
        "gather_topk: scores: allowed a tensor of float32",
    ),
    (lambda kw: {"scores": kw["scores"][:, 1:]}, ValueError, "gather_topk: x: allowed"),
    (lambda kw: {"scores": kw["scores"].double()}, TypeError, 'backend="reference"'),
    (
        lambda kw: {"keep": kw["scores"]},
        TypeError,
        "gather_topk: keep: allowed a tensor of bool",
    ),
    (
        lambda kw: {"order": "random"},
        ValueError,
        "gather_topk: order: allowed 'index', 'score'",
    ),
    (lambda kw: {"fuse": "max"}, ValueError, "gather_topk: fuse: allowed"),
    (lambda kw: {"x": kw["x"].long(), "fuse": "sum"}, TypeError, "with fuse"),
    (lambda kw: {"prefix": 1}, ValueError, "gather_topk: x: allowed"),
]
