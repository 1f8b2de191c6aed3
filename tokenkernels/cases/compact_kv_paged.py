"""The paged caches that compact_kv_paged is tried on, the calls it refuses, and what a call must
move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._case import Bad, BadValues, Case, Make
from ._compact import kept, launches_of, moved_rows, ragged, with_options

_JUNK = 1_000_003
"""Stands behind the blocks that hold rows, where nothing may be read."""


def _table(t: Make, blocks: int, size: int, most: int, lengths: Sequence[int]) -> Tensor:
    """Random blocks for sequences of these lengths."""
    table = t.permutation(blocks)[: len(lengths) * most].view(len(lengths), most)
    used = torch.tensor([[-(-length // size)] for length in lengths], device=t.device)
    return torch.where(torch.arange(most, device=t.device) < used, table, _JUNK)


def _layers(
    t: Make, heads: Sequence[int], blocks: int, size: int, channels: int
) -> list[tuple[Tensor, ...]]:
    return [
        (t.randn(blocks, size, count, channels), t.randn(blocks, size, count, channels))
        for count in heads
    ]


def _paged(
    t: Make,
    lengths: Sequence[int],
    size: int,
    *,
    heads: Sequence[int] = (2, 2),
    channels: int = 16,
) -> dict[str, Any]:
    """Sequences of these lengths in a pool with two blocks to spare and one more in every table."""
    most = -(-max(lengths) // size) + 1
    blocks = most * len(lengths) + 2
    return {
        "pool": _layers(t, heads, blocks, size, channels),
        "block_table": _table(t, blocks, size, most, lengths),
        "lengths": torch.tensor(lengths, device=t.device),
    }


def _per_sample(t: Make) -> dict[str, Any]:
    return _paged(t, [30, 17, 24], 4) | {"index": ragged(t, [30, 17, 24], 12, (3,))}


def _shared(t: Make) -> dict[str, Any]:
    """One index for all, wide rows, tables of 32 bits."""
    call = _paged(t, [33, 29], 16, heads=(3, 1, 2), channels=5)
    return call | {"index": kept(t, 29, 13), "block_table": call["block_table"].int()}


def _per_head(t: Make) -> dict[str, Any]:
    """Blocks whose size is no power of two."""
    return _paged(t, [37, 37, 37], 5, heads=(4,), channels=24) | {
        "index": ragged(t, [37], 21, (3, 4)).int()
    }


def _per_layer(t: Make) -> dict[str, Any]:
    call = _paged(t, [20, 33], 8, heads=(3, 3, 3, 3), channels=32)
    index = [kept(t, 20, 6), kept(t, 1, 1), ragged(t, [20], 15, (2, 3)), kept(t, 8, 0)]
    lengths = [call["lengths"], torch.tensor(1, device=t.device)]
    lengths += [torch.tensor([[20] * 3, [33] * 3], device=t.device), call["lengths"].int()]
    return call | {"index": index, "lengths": lengths}


def _after_another(t: Make) -> dict[str, Any]:
    """Heads of their own lengths, as one compaction leaves them for the next."""
    call = _paged(t, [19, 19], 4, heads=(3, 3), channels=10)
    lengths = torch.tensor([[19, 8, 13]] * 2, device=t.device).int()
    return call | {"index": ragged(t, [19, 8, 13], 14, (2, 3)), "lengths": lengths}


def _many_heads(t: Make) -> dict[str, Any]:
    """More index rows than are looked at together; one of the last alone decides what is free."""
    index = torch.full((1, 130, 5), -1, device=t.device)
    index[..., :2] = torch.arange(1, 3, device=t.device)
    index[:, -1] = torch.arange(1, 6, device=t.device)
    call = _paged(t, [7], 1, heads=(130,), channels=2)
    return call | {"pool": [call["pool"][0][:1]], "index": index}


def _many_layers(t: Make) -> dict[str, Any]:
    """More than a GPU takes in one launch; one of the first alone decides what is free."""
    call = _paged(t, [14, 9], 2, heads=[1, 2] * 65, channels=2)
    index = [kept(t, 9, 8 if i == 3 else 2) for i in range(130)]
    return call | {"pool": [layer[:1] for layer in call["pool"]], "index": index}


def _with_scales(t: Make) -> dict[str, Any]:
    call = _paged(t, [18, 25], 16)
    shape = (*call["pool"][0][0].shape[:3], 40)
    pool = [
        (
            t.randint(-128, 128, shape).to(torch.int8),
            t.randint(-128, 128, shape).to(torch.int8),
            t.rand(*shape[:3], 1, dtype=torch.float32),
        )
        for _ in range(2)
    ]
    return call | {"pool": pool, "index": ragged(t, [18], 9, (2,))}


def _heads_first(t: Make) -> dict[str, Any]:
    """Blocks that hold one head after the other, keys and values in one tensor."""
    call = _paged(t, [26, 31], 8, heads=())
    blocks = call["block_table"].numel() + 2
    joint = t.randn(2, blocks, 3, 8, 48)[..., :40].transpose(2, 3)
    return call | {"pool": [tuple(joint.unbind(0))], "index": ragged(t, [26], 20, (2,))}


def _common_prefix(t: Make) -> dict[str, Any]:
    """Two blocks belong to both sequences, which keep all of them."""
    call = _paged(t, [21, 30], 4)
    call["block_table"][1, :2] = call["block_table"][0, :2]
    index = torch.cat((torch.arange(8, device=t.device), 8 + kept(t, 13, 6)))
    return call | {"index": index}


def _rope(lengths: Sequence[int], heads: int, channels: int, rows: tuple[int, ...]) -> Any:
    def make(t: Make) -> dict[str, Any]:
        index = ragged(t, lengths, 17, rows) if rows else kept(t, min(lengths), 17)
        inv_freq = 10000.0 ** -(torch.arange(0, channels, 2, device=t.device) / channels)
        rope = (inv_freq, 3 * index + 70_000, torch.arange(17, device=t.device))
        return _paged(t, lengths, 8, heads=(heads, heads), channels=channels) | {
            "index": index,
            "rope": rope,
        }

    return make


def _rope_per_layer(t: Make) -> dict[str, Any]:
    """Keys turned by positions of their own in every layer, or not at all, with one more tensor
    behind the values.
    """
    call = _paged(t, [24, 24], 4, channels=14)
    index = [ragged(t, [24, 15], 12, (2, 2)), ragged(t, [24, 15], 9, (2,)).int()]
    old = [torch.where(rows % 3 == 0, rows, 2 * rows + 5) for rows in index]
    pool = [(*pair, t.randn(*pair[0].shape[:3], 1)) for pair in call["pool"]]
    return call | {"pool": pool, "index": index, "rope": (t.rand(7), old, index)}


_BOTH = ("stable", "fill")
_SMALL: dict[str, tuple[Any, tuple[str, ...]]] = {
    "per-sample": (_per_sample, _BOTH),
    "shared": (_shared, _BOTH),
    "per-head-int32": (_per_head, _BOTH),
    "per-layer": (_per_layer, _BOTH),
    "after-another": (_after_another, _BOTH),
    "many-heads": (_many_heads, ("stable",)),
    "many-layers": (_many_layers, ("stable",)),
    "int8-scales": (_with_scales, ("stable",)),
    "heads-first": (_heads_first, _BOTH),
    "common-prefix": (_common_prefix, ("stable",)),
    "rope": (_rope([40, 33], 3, 36, ()), _BOTH),
    "rope-per-head": (_rope([40, 40], 3, 64, (2, 3)), _BOTH),
    "rope-per-layer": (_rope_per_layer, _BOTH),
}
"""Name → what draws it, in which orders."""


def _cache_of(
    layers: int, batch: int, tokens: int, count: int, order: str, heads_first: bool
) -> Any:
    """Eight heads of 128 channels in blocks of 16 rows; every layer in memory of its own, filled
    from one draw.
    """

    def make(t: Make) -> dict[str, Any]:
        most = tokens // 16
        rows = t.randn(batch * most, *((8, 16) if heads_first else (16, 8)), 128)
        pool = [(rows.clone(), rows.clone()) for _ in range(layers)]
        if heads_first:
            pool = [(key.transpose(1, 2), value.transpose(1, 2)) for key, value in pool]
        index = torch.stack([kept(t, tokens, count) for _ in range(batch)])
        return {
            "pool": pool,
            "block_table": t.permutation(batch * most).view(batch, most).int(),
            "index": index,
            "lengths": torch.full((batch,), tokens, device=t.device),
            "order": order,
        }

    return make


def cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    """Every row that moves is read and written once."""
    total = 0.0
    for i, layer in enumerate(kwargs["pool"]):
        index = kwargs["index"] if isinstance(kwargs["index"], Tensor) else kwargs["index"][i]
        table = index.flatten(0, -2).tolist() if index.ndim > 1 else [index.tolist()]
        rows = sum(moved_rows(row, True, kwargs.get("order") == "fill") for row in table)
        walks = len(kwargs["block_table"]) * layer[0].shape[2]
        share = walks / max(1, index.shape[:-1].numel())
        total += 2 * share * rows * sum(t.shape[3] * t.element_size() for t in layer)
    return total, 0


def launches(kwargs: dict[str, Any]) -> tuple[int, int]:
    return launches_of(kwargs["pool"], kwargs, "rope" in kwargs)


def _first_index(kwargs: dict[str, Any], value: int) -> dict[str, Any]:
    """The last row of the index, which is full, with another first entry."""
    index = kwargs["index"].clone()
    index[-1, 0] = value
    return {"index": index}


def _last_entry(value: int) -> Any:
    """The last row of the index, which is full, with another last entry."""

    def changed(kwargs: dict[str, Any]) -> dict[str, Any]:
        index = kwargs["index"].clone()
        index[-1, -1] = value
        return {"index": index}

    return changed


def _block(kwargs: dict[str, Any], value: int) -> dict[str, Any]:
    """Another first block of the last sequence."""
    table = kwargs["block_table"].clone()
    table[-1, 0] = value
    return {"block_table": table}


_BAD_INDEX = "compact_kv_paged: index: allowed ascending positions below the length"
_BAD_LENGTHS = "compact_kv_paged: lengths: allowed 0 … T"
_BAD_BLOCKS = "compact_kv_paged: block_table: allowed blocks of the pool where rows are"
_IN_PLACE = "a contiguous last dimension in place"


def _ropes(kwargs: dict[str, Any], count: int, old: Tensor, new: Tensor) -> dict[str, Any]:
    return {"rope": (torch.ones(count, device=old.device), old, new)}


BAD: list[Bad] = [
    (
        lambda kw: {"block_table": kw["block_table"].float()},
        TypeError,
        "compact_kv_paged: block_table: allowed a tensor of int64, int32",
    ),
    (
        lambda kw: {"block_table": kw["block_table"][0]},
        ValueError,
        "compact_kv_paged: block_table: allowed 2 dimensions",
    ),
    (
        lambda kw: {"block_table": kw["block_table"][:, :2]},
        ValueError,
        "compact_kv_paged: index: allowed at most max_blocks · block_size = 8 entries",
    ),
    (
        lambda kw: {"lengths": kw["lengths"][1:]},
        ValueError,
        "compact_kv_paged: lengths: allowed shape",
    ),
    (
        lambda kw: {"lengths": None},
        TypeError,
        "compact_kv_paged: lengths: allowed a tensor of int64",
    ),
    (lambda kw: {"index": kw["index"][1:]}, ValueError, "compact_kv_paged: index: allowed shape"),
    (
        lambda kw: {"index": kw["index"].float()},
        TypeError,
        "compact_kv_paged: index: allowed a tensor of int64, int32",
    ),
    (
        lambda kw: {"index": [kw["index"]] * 3},
        ValueError,
        "compact_kv_paged: index: allowed one tensor, or a list",
    ),
    (lambda kw: {"pool": []}, ValueError, "compact_kv_paged: pool: allowed a list of tuples"),
    (
        lambda kw: {"pool": kw["pool"][0]},
        ValueError,
        "compact_kv_paged: pool: allowed a list of tuples",
    ),
    (
        lambda kw: {"pool": [tuple(t[1:] for t in kw["pool"][0]), kw["pool"][1]]},
        ValueError,
        "compact_kv_paged: pool: allowed .num_blocks, block_size. = ",
    ),
    (
        lambda kw: {"pool": [tuple(t[:, :0] for t in kw["pool"][0])]},
        ValueError,
        "compact_kv_paged: pool: allowed blocks of at least one row",
    ),
    (
        lambda kw: {"pool": [tuple(t.mT.contiguous().mT for t in kw["pool"][0])]},
        ValueError,
        _IN_PLACE,
    ),
    (lambda kw: {"pool": [(kw["pool"][0][0],) * 2]}, ValueError, "share no memory"),
    (
        lambda kw: {"pool": [(kw["pool"][0][0][:, :, :1].expand(-1, -1, 2, -1),)]},
        ValueError,
        "not overlap themselves",
    ),
    (
        lambda kw: {"order": "random"},
        ValueError,
        "compact_kv_paged: order: allowed 'stable', 'fill'",
    ),
    (
        lambda kw: _ropes(kw, 7, kw["index"], kw["index"]),
        ValueError,
        "compact_kv_paged: rope: allowed D / 2 = 8",
    ),
    (
        lambda kw: _ropes(kw, 8, kw["index"], kw["index"][:, 1:]),
        ValueError,
        "compact_kv_paged: rope: allowed one pos",
    ),
]

BAD_VALUES = [
    BadValues(lambda kw: _first_index(kw, 24), _BAD_INDEX),
    BadValues(lambda kw: _first_index(kw, -1), _BAD_INDEX),
    BadValues(lambda kw: _first_index(kw, -7), _BAD_INDEX),
    BadValues(lambda kw: _first_index(kw, 2**40), _BAD_INDEX),
    BadValues(_last_entry(-7), _BAD_INDEX, _last_entry(-1)),
    BadValues(_last_entry(2**40), _BAD_INDEX, _last_entry(-1)),
    BadValues(lambda kw: {"index": kw["index"].flip(-1)}, _BAD_INDEX),
    BadValues(lambda kw: {"lengths": kw["lengths"] - 12}, _BAD_INDEX),
    BadValues(lambda kw: {"lengths": kw["lengths"] + 12}, _BAD_LENGTHS),
    BadValues(lambda kw: {"lengths": -kw["lengths"]}, _BAD_LENGTHS),
    BadValues(lambda kw: _block(kw, -1), _BAD_BLOCKS),
    BadValues(lambda kw: _block(kw, 29), _BAD_BLOCKS),
    BadValues(lambda kw: _block(kw, 2**40), _BAD_BLOCKS),
    BadValues(lambda kw: _block(kw, int(kw["block_table"][-1, 1])), _BAD_BLOCKS),
    BadValues(lambda kw: _block(kw, int(kw["block_table"][1, 0])), _BAD_BLOCKS),
    BadValues(
        lambda kw: _ropes(kw, 8, kw["index"], kw["index"] + 2**31),
        "compact_kv_paged: rope: allowed positions of 32 bits",
        lambda kw: _ropes(kw, 8, kw["index"] - 2**30, kw["index"] + 2**30),
    ),
]

CASES = [
    *(
        Case(
            f"{name}-{order}",
            with_options(make, order=order),
            ("test", "inplace", *["long"] * (make is _many_layers)),
        )
        for name, (make, orders) in _SMALL.items()
        for order in orders
    ),
    *(
        Case(
            f"{name} {layers}x{batch}x{tokens}x8x128 -> {tokens // 2} {order}",
            _cache_of(layers, batch, tokens, tokens // 2, order, name == "heads first"),
            ("bench", "inplace"),
            (dtype,),
        )
        for name, layers, batch, tokens, dtype in (
            ("vllm", 16, 4, 2048, torch.float32),
            ("vllm", 32, 4, 2048, torch.bfloat16),
            ("heads first", 32, 4, 2048, torch.bfloat16),
        )
        for order in _BOTH
    ),
]
