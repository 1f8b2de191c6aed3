"""The caches that compact_kv is tried on, the calls it refuses, and what a call must move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._case import Bad, BadValues, Case, Make
from ._compact import kept, launches_of, moved_rows, ragged, with_options


def _cache(t: Make, batch: int, heads: int, tokens: Sequence[int], channels: int) -> list[Any]:
    return [
        (t.randn(batch, heads, n, channels), t.randn(batch, heads, n, channels)) for n in tokens
    ]


def _per_sample(t: Make) -> dict[str, Any]:
    index = ragged(t, [30, 17, 24], 12, (3,))
    lengths = torch.tensor([30, 17, 24], device=t.device)
    return {"layers": _cache(t, 3, 2, [30, 33], 16), "index": index, "lengths": lengths}


def _one_layer(t: Make) -> dict[str, Any]:
    return {"layers": _cache(t, 2, 1, [6], 4), "index": kept(t, 6, 3)}


def _shared(t: Make) -> dict[str, Any]:
    return {"layers": _cache(t, 2, 3, [40, 29], 5), "index": kept(t, 29, 13)}


def _per_head(t: Make) -> dict[str, Any]:
    index = ragged(t, [37], 21, (3, 4)).int()
    return {"layers": _cache(t, 3, 4, [37], 24), "index": index}


def _per_layer(t: Make) -> dict[str, Any]:
    layers = _cache(t, 2, 3, [20, 1, 33, 8], 32)
    index = [kept(t, 20, 6), kept(t, 1, 1), ragged(t, [33], 15, (2, 3)), kept(t, 8, 0)]
    return {
        "layers": layers,
        "index": index,
        "lengths": [torch.tensor(n, device=t.device) for n in (20, 1, 33, 8)],
    }


def _lengths_per_head(t: Make) -> dict[str, Any]:
    """Lengths of their own for every head, shorter than the cache, in 32 bits."""
    index = ragged(t, [19, 8, 13], 14, (2, 3))
    lengths = torch.tensor([[19, 8, 13]] * 2, device=t.device).int()
    return {"layers": _cache(t, 2, 3, [22, 19], 10), "index": index, "lengths": lengths}


def _mixed_layers(t: Make) -> dict[str, Any]:
    """Indices of 32 and 64 bits, per head, per sample, shared; lengths likewise."""
    index = [
        ragged(t, [20], 7, (2, 3)).int(), ragged(t, [11], 11, (2,)), kept(t, 9, 4).int()
    ]  # fmt: skip
    lengths = [
        torch.full((2, 3), 20), torch.tensor([11, 12]).int(), torch.tensor(9)
    ]  # fmt: skip
    lengths = [one.to(t.device) for one in lengths]
    return {"layers": _cache(t, 2, 3, [21, 12, 9], 6), "index": index, "lengths": lengths}


def _with_scales(t: Make) -> dict[str, Any]:
    layers = []
    for tokens in (18, 25):
        values = [t.randint(-128, 128, (2, 2, tokens, 40)).to(torch.int8) for _ in range(2)]
        layers.append((*values, t.rand(2, 2, tokens, 1, dtype=torch.float32)))
    return {"layers": layers, "index": ragged(t, [18], 9, (2, 2))}


def _strided(t: Make) -> dict[str, Any]:
    layers = [tuple(t.randn(2, 26, 3, 48)[..., :40].transpose(1, 2) for _ in range(2))]
    return {"layers": layers, "index": ragged(t, [26], 32, (2, 32))[:, 0, :20]}


def _rope(
    batch: int, heads: int, tokens: int, channels: int, count: int, rows: tuple[int, ...]
) -> Any:
    def make(t: Make) -> dict[str, Any]:
        index = ragged(t, [tokens], count, rows) if rows else kept(t, tokens, count)
        inv_freq = 10000.0 ** -(torch.arange(0, channels, 2, device=t.device) / channels)
        new = torch.arange(count, device=t.device)
        rope = (inv_freq, 3 * index + 70_000, new)
        return {
            "layers": _cache(t, batch, heads, [tokens, tokens], channels),
            "index": index,
            "rope": rope,
        }

    return make


def _long_range(t: Make) -> dict[str, Any]:
    """Large angles, and entries whose position stays."""
    index = kept(t, 50, 30)
    old = torch.where(index % 3 == 0, index, index + 1_000_003).int()
    inv_freq = t.rand(300, dtype=torch.float32)
    return {
        "layers": _cache(t, 2, 1, [50], 600),
        "index": index,
        "rope": (inv_freq, old, index),
        "order": "fill",
    }


def _rope_per_layer(t: Make) -> dict[str, Any]:
    """Keys turned by positions of their own in every layer, ragged, below lengths per sample, with
    one more tensor behind the values.
    """
    index = [ragged(t, [24, 15], 12, (2, 2)), ragged(t, [24, 15], 9, (2,)).int()]
    new = [torch.arange(12, device=t.device), torch.arange(9, device=t.device).expand(2, 9)]
    old = [2 * rows + 5 for rows in index]
    return {
        "layers": [(*pair, t.randn(2, 2, 24, 1)) for pair in _cache(t, 2, 2, [24, 24], 14)],
        "index": index,
        "lengths": torch.tensor([24, 24], device=t.device),
        "rope": (t.rand(7), old, new),
    }


def _heads_together(t: Make) -> dict[str, Any]:
    """All heads of a position side by side, which keep the same."""
    layers = [tuple(t.randn(2, n, 3, 8).transpose(1, 2) for _ in range(2)) for n in (21, 17)]
    return {"layers": layers, "index": ragged(t, [17], 9, (2,))}


def _many_layers(t: Make) -> dict[str, Any]:
    """More than a GPU takes in one launch, each with a shape and an index of its own."""
    tokens = [3 + i % 7 for i in range(130)]
    layers = [(t.randn(1, 1, n, 2), t.randn(1, 1, n, 3)) for n in tokens]
    return {"layers": layers, "index": [kept(t, n, 2) for n in tokens]}


def _many_like_layers(t: Make) -> dict[str, Any]:
    return {
        "layers": [(t.randn(2, 1, 5, 2),) for _ in range(131)],
        "index": ragged(t, [5], 3, (2,)),
    }


_BOTH = ("stable", "fill")
_SMALL: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "per-sample": (_per_sample, _BOTH, ()),
    "one-layer": (_one_layer, ("stable",), ("coupled",)),
    "shared": (_shared, ("stable",), ("coupled",)),
    "per-head-int32": (_per_head, _BOTH, ()),
    "per-layer": (_per_layer, ("fill",), ("coupled",)),
    "lengths-per-head": (_lengths_per_head, _BOTH, ()),
    "mixed-layers": (_mixed_layers, _BOTH, ("coupled",)),
    "rope-per-layer": (_rope_per_layer, _BOTH, ("coupled",)),
    "int8-scales": (_with_scales, ("stable",), ()),
    "heads-together": (_heads_together, _BOTH, ()),
    "many-layers": (_many_layers, ("stable",), ("coupled", "long")),
    "many-like-layers": (_many_like_layers, ("fill",), ("long",)),
    "strided": (_strided, ("fill",), ()),
    "rope": (_rope(2, 3, 40, 36, 17, ()), ("stable",), ("coupled",)),
    "rope-per-head": (_rope(2, 3, 40, 64, 25, (2, 3)), _BOTH, ("coupled",)),
    "rope-long-range": (_long_range, ("fill",), ("coupled",)),
}
"""Name → what draws it, in which orders, other tags."""


def _cache_of(
    layers: int,
    batch: int,
    heads: int,
    tokens: int,
    count: int,
    channels: int = 128,
    **options: Any,
) -> Any:
    """Every layer in memory of its own, filled from one draw."""

    def make(t: Make) -> dict[str, Any]:
        rows = t.randn(batch, heads, tokens, channels)
        cache = [(rows.clone(), rows.clone()) for _ in range(layers)]
        return {"layers": cache, "index": kept(t, tokens, count)} | options

    return make


def _small(inplace: bool) -> list[Case]:
    cases = []
    for name, (make, orders, tags) in _SMALL.items():
        for order in orders:
            options = {"order": order} | ({"inplace": True} if inplace else {})
            tag = ("test", *tags, *["inplace"] * inplace)
            cases.append(Case(f"{name}-{order}", with_options(make, **options), tag))
    return cases


def cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    """Every row that moves is read and written once; padding is written."""
    total = 0.0
    inplace, fill = kwargs.get("inplace", False), kwargs.get("order") == "fill"
    for i, layer in enumerate(kwargs["layers"]):
        index = kwargs["index"] if isinstance(kwargs["index"], Tensor) else kwargs["index"][i]
        table = index.flatten(0, -2).tolist() if index.ndim > 1 else [index.tolist()]
        rows = sum(moved_rows(row, inplace, fill) for row in table)
        padding = 0 if inplace else int((index < 0).sum())
        share = layer[0].shape[:2].numel() / max(1, index.shape[:-1].numel())
        total += (
            share
            * (2 * rows + padding)
            * sum(tensor.shape[3] * tensor.element_size() for tensor in layer)
        )
    return total, 0


def launches(kwargs: dict[str, Any]) -> tuple[int, int]:
    return launches_of(kwargs["layers"], kwargs)


BAD: list[Bad] = [
    (lambda kw: {"lengths": kw["lengths"][1:]}, ValueError, "compact_kv: lengths: allowed shape"),
    (
        lambda kw: {"lengths": kw["lengths"].float()},
        TypeError,
        "compact_kv: lengths: allowed a tensor of int64",
    ),
    (
        lambda kw: {"lengths": [kw["lengths"]]},
        ValueError,
        "compact_kv: lengths: allowed one tensor, or a list",
    ),
    (lambda kw: {"index": kw["index"][1:]}, ValueError, "compact_kv: index: allowed shape"),
    (lambda kw: {"index": kw["index"][:, None]}, ValueError, "compact_kv: index: allowed shape"),
    (
        lambda kw: {"index": kw["index"].float()},
        TypeError,
        "compact_kv: index: allowed a tensor of int64, int32",
    ),
    (
        lambda kw: {"index": [kw["index"]] * 3},
        ValueError,
        "compact_kv: index: allowed one tensor, or a list",
    ),
    (lambda kw: {"layers": []}, ValueError, "compact_kv: layers: allowed a list of tuples"),
    (lambda kw: {"layers": [()]}, ValueError, "compact_kv: layers: allowed a list of tuples"),
    (
        lambda kw: {"layers": kw["layers"][0]},
        ValueError,
        "compact_kv: layers: allowed a list of tuples",
    ),
    (
        lambda kw: {"layers": [kw["layers"][0], kw["layers"][1][:1]]},
        ValueError,
        "compact_kv: layers: allowed 2 tensors",
    ),
    (
        lambda kw: {"layers": [(kw["layers"][0][0], kw["layers"][1][0])]},
        ValueError,
        "compact_kv: layers: allowed",
    ),
    (
        lambda kw: {"layers": [[t[1:] for t in kw["layers"][0]], kw["layers"][1]]},
        ValueError,
        "one batch size",
    ),
    (lambda kw: {"order": "random"}, ValueError, "compact_kv: order: allowed 'stable', 'fill'"),
    (lambda kw: {"inplace": 1}, TypeError, "compact_kv: inplace: allowed a bool"),
    (
        lambda kw: {"rope": (torch.ones(7, device=kw["index"].device), kw["index"], kw["index"])},
        ValueError,
        "compact_kv: rope: allowed D / 2 = 8",
    ),
    (
        lambda kw: {
            "rope": (torch.ones(8, device=kw["index"].device), kw["index"], kw["index"][:, 1:])
        },
        ValueError,
        "compact_kv: rope: allowed one pos",
    ),
    (
        lambda kw: {"rope": kw["index"]},
        ValueError,
        "compact_kv: rope: allowed .inv_freq, old_positions, new_positions",
    ),
    (
        lambda kw: {
            "rope": (torch.ones(8, device=kw["index"].device), kw["index"], kw["index"]),
            "layers": [tuple(t.double() for t in kw["layers"][0])],
        },
        TypeError,
        'backend="reference"',
    ),
]
BAD_IN_PLACE: list[Bad] = [
    (
        lambda kw: {"layers": [tuple(t.mT.contiguous().mT for t in kw["layers"][0])]},
        ValueError,
        "contiguous last dimension",
    ),
    (lambda kw: {"layers": [(kw["layers"][0][0],) * 2]}, ValueError, "share no memory"),
    (
        lambda kw: {"layers": [(kw["layers"][0][0][:, :1].expand(-1, 2, -1, -1),)]},
        ValueError,
        "not overlap themselves",
    ),
    (
        lambda kw: {"index": torch.cat([kw["index"]] * 3, 1)},
        ValueError,
        "at most T = 30 entries in place",
    ),
]


def _of_last(name: str, change: Callable[[Any], Any]) -> Any:
    """The last image's index, which is full, or length, changed."""

    def changed(kwargs: dict[str, Any]) -> dict[str, Any]:
        rows = kwargs[name].clone()
        rows[-1] = change(rows[-1])
        return {name: rows}

    return changed


def _starting(value: int) -> Any:
    """The last image's index with another first entry."""
    return _of_last("index", lambda row: torch.cat((torch.full_like(row[:1], value), row[1:])))


def _repeated(entry: int) -> Any:
    """The last image's index of one entry only, to be filled up: every slot looks for a hole."""
    row = _of_last("index", lambda row: torch.full_like(row, entry))
    return lambda kwargs: row(kwargs) | {"order": "fill"}


_BAD_INDEX = "compact_kv_?: index: allowed ascending positions below the length"
_BAD_LENGTH = "compact_kv_?: lengths: allowed 0"
BAD_VALUES = [
    *(BadValues(_starting(value), _BAD_INDEX) for value in (24, -1, -7, 2**40)),
    BadValues(_of_last("index", lambda row: row.flip(-1)), _BAD_INDEX),
    BadValues(_of_last("index", lambda row: row.clamp(min=3)), _BAD_INDEX),
    *(BadValues(_repeated(entry), _BAD_INDEX) for entry in (0, 3, 11)),
    BadValues(_of_last("lengths", lambda length: length - 12), _BAD_INDEX),
    BadValues(_of_last("lengths", lambda length: length + 12), _BAD_LENGTH),
    BadValues(_of_last("lengths", lambda length: -length), _BAD_LENGTH),
    BadValues(_of_last("lengths", lambda length: length + 2**40), _BAD_LENGTH),
    BadValues(
        lambda kw: {
            "rope": (torch.ones(8, device=kw["index"].device), kw["index"], kw["index"] + 2**31)
        },
        "positions of 32 bits",
    ),
]

CASES = [
    *_small(inplace=False),
    Case("mustdrop 13x1x32x640x128 -> 109", _cache_of(13, 1, 32, 640, 109), ("bench",)),
    Case("llm 32x1x8x8192x128 -> 4096", _cache_of(32, 1, 8, 8192, 4096), ("bench",)),
]

CASES_IN_PLACE = [
    *_small(inplace=True),
    *(
        Case(
            f"llm {layers}x1x8x8192x128 -> 4096 {order}",
            _cache_of(layers, 1, 8, 8192, 4096, order=order, inplace=True),
            ("bench", "inplace"),
            (dtype,),
        )
        for layers, dtype in ((32, torch.bfloat16), (16, torch.float32))
        for order in ("stable", "fill")
    ),
]
