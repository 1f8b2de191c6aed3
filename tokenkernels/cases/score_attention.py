"""The inputs that score_attention is tried on, the calls it refuses, and what a call must cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._case import Bad, BadValues, Case, Make


def _tokens(
    t: Make, batch: int, heads: int, key_heads: int, rows: int, keys: int, dim: int
) -> dict[str, Any]:
    return {"query": t.randn(batch, heads, rows, dim), "key": t.randn(batch, key_heads, keys, dim)}


def _simple(*sizes: int, **options: Any) -> Any:
    return lambda t: _tokens(t, *sizes) | options


def _positioned(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 3, 4, 2, 9, 300, 20)
    return kwargs | {
        "causal": True,
        "query_positions": t.randint(-1, 305, (3, 9)),
        "key_lengths": torch.tensor([300, 0, 259], device=t.device),
        "row_weights": t.rand(3, 9, dtype=torch.float32),
        "reduce": ("sum", "max"),
    }


def _padded(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 3, 6, 2, 4, 37, 16)
    return kwargs | {
        "causal": True,
        "key_lengths": torch.tensor([37, 2, 20], device=t.device),
        "heads": "group",
    }


def _given_lse(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 2, 4, 2, 5, 600, 24)
    keys = kwargs["key"].double().repeat_interleave(2, 1)
    logits = kwargs["query"].double() @ keys.mT * 0.3
    return kwargs | {
        "scale": 0.3,
        "lse": logits.logsumexp(-1).float(),
        "columns": (270, 590),
        "heads": "none",
        "reduce": ("sum", "max"),
    }


def _lse_of(t: Make, kwargs: dict[str, Any]) -> Tensor:
    """The logarithm of what the rows see in all; −inf where that is nothing."""
    query, key = kwargs["query"].double(), kwargs["key"].double()
    rows, keys = query.shape[2], key.shape[2]
    lengths = kwargs.get("key_lengths", torch.full((len(key),), keys, device=t.device))
    column = torch.arange(keys, device=t.device)
    seen = column < lengths[:, None, None]
    if kwargs.get("causal"):
        last = lengths[:, None] - rows + torch.arange(rows, device=t.device)
        seen = seen & (column <= kwargs.get("query_positions", last)[..., None])
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    logits = logits * query.shape[3] ** -0.5
    return logits.masked_fill(~seen.unsqueeze(1), -torch.inf).logsumexp(-1).float()


def _lse_and(make: Any, **options: Any) -> Any:
    def with_lse(t: Make) -> dict[str, Any]:
        kwargs = make(t) | options
        return kwargs | {"lse": _lse_of(t, kwargs)}

    return with_lse


def _weighted(t: Make) -> dict[str, Any]:
    """One pass or two, every row with a weight, columns within the lengths and beyond."""
    kwargs = _tokens(t, 3, 4, 2, 6, 90, 12)
    return kwargs | {
        "key_lengths": torch.tensor([90, 31, 64], device=t.device).int(),
        "row_weights": t.rand(3, 6, dtype=torch.float32),
        "columns": (20, 77),
    }


def _unseen_nan(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 2, 2, 1, 12, 70, 8)
    lengths = torch.tensor([61, 30], device=t.device)
    kwargs["key"][0, :, 61:] = torch.nan
    kwargs["key"][1, :, 40] = torch.inf
    kwargs["query"][0, 1, 3] = torch.nan
    kwargs["key"][0, 0, 60, 0] = torch.nan
    return kwargs | {
        "causal": True,
        "key_lengths": lengths,
        "heads": "none",
        "reduce": ("sum", "max"),
    }


def _large_logits(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 2, 2, 2, 7, 530, 32)
    kwargs["query"][:, :, 1] *= 40
    kwargs["query"][:, :, 2] = 0
    return kwargs | {"scale": -0.5, "reduce": ("sum", "max")}


def _equal_scores(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 2, 4, 2, 5, 133, 16)
    kwargs["query"][:, 1:] = 0
    return kwargs | {"causal": True, "heads": "group", "reduce": ("sum", "max"), "pool": 3}


def _one_hot(t: Make) -> dict[str, Any]:
    """Each row gives all of its attention to one key; two keys get that of two rows."""
    kwargs = _tokens(t, 2, 3, 1, 9, 71, 80)
    kwargs["key"][:] = torch.eye(80, device=t.device)[:71]
    kwargs["query"][:] = torch.eye(80, device=t.device)[7::8][torch.arange(9) % 7] * 256
    return kwargs | {"scale": 1.0, "heads": "none", "reduce": ("sum", "max")}


def _logits_of_ten_thousand(t: Make) -> dict[str, Any]:
    """Integers, so that products are exact, and several of the highest are the same."""
    kwargs = _tokens(t, 2, 4, 2, 6, 150, 20)
    for name, most in (("query", 16), ("key", 4)):
        drawn = t.randint(-most, most + 1, tuple(kwargs[name].shape))
        kwargs[name] = drawn.to(kwargs[name].dtype)
    return kwargs | {"scale": 25.0, "reduce": ("sum", "max")}


def _nothing_seen(t: Make) -> dict[str, Any]:
    kwargs = _tokens(t, 3, 2, 1, 4, 40, 24)
    positions = t.randint(0, 40, (3, 4))
    positions[1] = -1
    return kwargs | {
        "causal": True,
        "query_positions": positions,
        "key_lengths": torch.tensor([0, 40, 33], device=t.device),
        "heads": "group",
        "reduce": ("sum", "max"),
    }


def _split_heads(t: Make) -> dict[str, Any]:
    tokens = t.randn(2, 50, 3, 4, 16)
    return {
        "query": tokens[:, 1:8, 0].transpose(1, 2),
        "key": tokens[:, :, 1].transpose(1, 2),
        "pool": 3,
    }


CASES = [
    Case("class-token", _simple(3, 4, 4, 1, 50, 32, columns=(1, 50))),
    Case(
        "text-rows",
        _simple(2, 6, 6, 13, 158, 17, causal=True, columns=(11, 139), reduce=("sum", "max")),
    ),
    Case(
        "window-gqa",
        _simple(2, 8, 2, 16, 300, 64, causal=True, columns=(0, 284), heads="group", pool=5),
    ),
    Case("window-per-head", _simple(2, 8, 2, 5, 90, 20, heads="none", reduce=("max",), pool=9)),
    Case("all-rows", _simple(1, 2, 1, 130, 130, 8, causal=True)),
    Case("group-of-three", _simple(2, 6, 2, 1, 65, 40, heads="group", reduce="max")),
    Case("few-rows", _simple(2, 4, 2, 2, 261, 9, reduce=("sum", "max"))),
    Case("one-key", _simple(2, 2, 2, 3, 1, 3)),
    Case("no-columns", _simple(2, 2, 1, 3, 20, 8, columns=(7, 7), pool=3)),
    Case("deep", _simple(1, 3, 1, 7, 70, 300, pool=101)),
    Case("long", _simple(1, 4, 2, 3, 3000, 8, reduce=("sum", "max"), pool=1023)),
    Case("many-heads", _simple(2, 67, 1, 5, 300, 8, heads="group", reduce=("sum", "max"))),
    Case("positions", _positioned),
    Case("padded", _padded),
    Case("lse", _given_lse),
    Case("lse-causal", _lse_and(_simple(2, 6, 2, 9, 130, 20), causal=True, reduce=("sum", "max"))),
    Case("lse-positions-group-pool", _lse_and(_positioned, heads="group", pool=7)),
    Case("lse-padded-columns", _lse_and(_padded, columns=(3, 30), reduce="max")),
    Case("lse-weights-columns", _lse_and(_weighted, heads="group", reduce=("sum", "max"))),
    Case("weights-columns-none", lambda t: _weighted(t) | {"heads": "none", "causal": True}),
    Case("weights-group-pool", lambda t: _weighted(t) | {"heads": "group", "pool": 3}),
    Case("unseen-nan", _unseen_nan, ("test", "no-opcheck")),
    Case("large-logits", _large_logits),
    Case("equal-scores", _equal_scores),
    Case("one-hot", _one_hot),
    Case("logits-of-ten-thousand", _logits_of_ten_thousand),
    Case("nothing-seen", _nothing_seen),
    Case("split-heads", _split_heads),
    Case(
        "text rows L=640 H=32 R=29",
        _simple(1, 32, 32, 29, 640, 128, causal=True, reduce=("sum", "max")),
        ("bench",),
    ),
    Case(
        "text rows L=2944 H=32 R=29",
        _simple(1, 32, 32, 29, 2944, 128, causal=True, reduce=("sum", "max")),
        ("bench",),
    ),
    Case(
        "snapkv w=64 H=32/8 S=8192",
        _simple(1, 32, 8, 64, 8192, 128, causal=True, columns=(0, 8128), heads="group", pool=5),
        ("bench",),
    ),
    Case("class token B=16 16x577", _simple(16, 16, 16, 1, 577, 64, columns=(1, 577)), ("bench",)),
]


def cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    query, key = kwargs["query"], kwargs["key"]
    columns = kwargs.get("columns") or (0, key.shape[2])
    results = 1 + (len(kwargs.get("reduce", ())) > 1)
    outputs = {"mean": 1, "group": key.shape[1], "none": query.shape[1]}[
        kwargs.get("heads", "mean")
    ]
    moved = (query.numel() + key.numel()) * query.element_size()
    moved += 4 * results * query.shape[0] * outputs * (columns[1] - columns[0])
    return moved, 2 * query.numel() * key.shape[2]


def launches(kwargs: dict[str, Any]) -> tuple[int, int]:
    """The softmax unless it is given, the scores, and what joins long rows or a wide pool."""
    joined = kwargs.get("heads") != "none" and kwargs["query"].shape[2] > 64
    return 1 + (kwargs.get("lse") is None) + (joined or kwargs.get("pool", 1) > 63), 0


BAD: list[Bad] = [
    (
        lambda kw: {"query": kw["query"][0]},
        ValueError,
        "score_attention: query: allowed 4 dimensions",
    ),
    (
        lambda kw: {"query": kw["query"][:, :, :0]},
        ValueError,
        "score_attention: query: allowed .B, H, R, D. with",
    ),
    (
        lambda kw: {"query": kw["query"][:, :3]},
        ValueError,
        "score_attention: key: allowed .3, G, N, 32. with N",
    ),
    (
        lambda kw: {"query": kw["query"].long()},
        TypeError,
        "score_attention: query: allowed a tensor of float32",
    ),
    (
        lambda kw: {"query": kw["query"].double(), "key": kw["key"].double()},
        TypeError,
        'backend="reference"',
    ),
    (
        lambda kw: {"key": kw["key"].half()},
        TypeError,
        "score_attention: key: allowed the dtype of query .float32., got float16",
    ),
    (
        lambda kw: {"key": kw["key"][..., :31]},
        ValueError,
        "score_attention: key: allowed .3, G, N, 32.",
    ),
    (
        lambda kw: {"key": kw["key"][:, :, :0]},
        ValueError,
        "score_attention: key: allowed .3, G, N, 32.",
    ),
    (lambda kw: {"scale": "big"}, TypeError, "score_attention: scale: allowed a number"),
    (lambda kw: {"causal": 1}, TypeError, "score_attention: causal: allowed True, False, got 1"),
    (
        lambda kw: {"query_positions": kw["key"].new_zeros(3, 1).long()},
        ValueError,
        "query_positions: allowed None without causal",
    ),
    (
        lambda kw: {"causal": True, "query_positions": kw["key"].new_zeros(3, 2).long()},
        ValueError,
        "query_positions: allowed shape .3, 1.",
    ),
    (
        lambda kw: {"key_lengths": kw["key"].new_ones(3, dtype=torch.float32)},
        TypeError,
        "key_lengths: allowed a tensor of int64, int32",
    ),
    (
        lambda kw: {"lse": kw["key"].new_ones(3, 4, dtype=torch.float32)},
        ValueError,
        "lse: allowed shape .3, 4, 1.",
    ),
    (
        lambda kw: {"row_weights": kw["key"].new_ones(1, dtype=torch.float32)},
        ValueError,
        "row_weights: allowed shape .3, 1.",
    ),
    (lambda kw: {"columns": 5}, ValueError, "columns: allowed a pair"),
    (lambda kw: {"columns": (0, 51)}, ValueError, "columns: allowed 0 … 50, got 51"),
    (lambda kw: {"columns": (9, 8)}, ValueError, "columns: allowed 0 … 8, got 9"),
    (lambda kw: {"heads": "all"}, ValueError, "heads: allowed 'mean', 'group', 'none'"),
    (lambda kw: {"reduce": ()}, ValueError, "reduce: allowed"),
    (lambda kw: {"reduce": ("max", "sum")}, ValueError, "reduce: allowed"),
    (lambda kw: {"pool": 4}, ValueError, "pool: allowed an odd number, got 4"),
    (lambda kw: {"pool": 0}, ValueError, "pool: allowed 1"),
]


def _causal(*positions: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """With these positions of the one row of each image."""

    def change(kwargs: dict[str, Any]) -> dict[str, Any]:
        rows = kwargs["key"].new_tensor(positions, dtype=torch.int64)
        return {"causal": True, "query_positions": rows[:, None]}

    return change


def _lengths(*lengths: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda kwargs: {"key_lengths": kwargs["key"].new_tensor(lengths, dtype=torch.int64)}


_REFUSED = "key_lengths, query_positions: allowed 0 … N and at least -1"
BAD_VALUES = [
    BadValues(_causal(-2, 7, -(2**40)), _REFUSED, _causal(-1, 7, -1)),
    BadValues(_lengths(50, 51, 0), _REFUSED, _lengths(50, 0, 0)),
    BadValues(_lengths(-1, 2**40, 20), _REFUSED, _lengths(0, 0, 20)),
]
