"""compact_kv on the host: what a call moves, as a table of integers, and the launch of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenkernels.triton import _fill
from tokenkernels.triton._compact import compact
from tokenkernels.triton._launch import (
    PROGRAMS,
    Config,
    Entry,
    Table,
    blocks,
    capability,
    launch,
)

KEYS = {
    torch.float32: (tl.float32, tl.int32),
    torch.float16: (tl.float16, tl.int16),
    torch.bfloat16: (tl.bfloat16, tl.int16),
}
TABLE = Table(
    [
        Entry(Config({"ROWS": 32, "SLOTS": 512}, stages=1), width=64, bytes=(1, 2)),
        Entry(Config({"ROWS": 8, "SLOTS": 512}, stages=1), bytes=(1, 2)),
        Entry(Config({"ROWS": 256, "SLOTS": 512}, stages=1), width=64),
        Entry(Config({"ROWS": 128, "SLOTS": 512}, stages=1), width=128),
        Entry(Config({"ROWS": 64, "SLOTS": 512}, stages=1), width=256),
        Entry(Config({"ROWS": 32, "SLOTS": 512}, stages=1)),
    ],
    "By smallest word and bytes of a row: 16 KB, so that each thread has 128 bytes under way.",
)
"""By the smallest word and the bytes of a program's columns. Tiles of 16 KB, of which every thread
holds 128 bytes; fewer where words are small. Loops stay as they are written: one stage.
"""
MOST_BYTES, LEAST_BYTES, MOST_TILES = 512, 64, 8
"""Of a row in one program; tiles of a program that shares a head with others."""


class Layout:
    """The table under construction, and what all records together decide."""

    def __init__(
        self, tensors: Sequence[Tensor], targets: Sequence[Tensor],
        kinds: Sequence[tuple[int, ...]], batch: int,
    ) -> None:  # fmt: skip
        self.values: list[int] = []
        self.kinds: dict[tuple[int, ...], int] = {}
        self.walks, self.batch = 0, batch
        named = []
        for source, target, kind in zip(tensors, targets, kinds, strict=True):
            self.walks += batch * kind[0]
            apart = source.data_ptr() | target.data_ptr()
            self.kinds[kind] = min(self.kinds.get(kind, 16), granule(apart, *kind[3:]))
            named.append((source.data_ptr(), target.data_ptr(), kind))
        places = {k: 3 * len(named) + 8 * n for n, k in enumerate(self.kinds)}
        for here, there, kind in named:
            self.values += here, there, places[kind]
        for kind, word in self.kinds.items():
            self.values += *kind, word

    def add(self, rows: Sequence[Tensor], entries: bool = True) -> tuple[int, int]:
        """Where the rows of layer 0 are, and how far on those of the next."""
        place = len(self.values) if rows else -1
        for one in rows:
            *strides, last = (*one.stride(), *[0] * (not entries))
            strides += [0] * (2 - len(strides))
            self.values += one.data_ptr(), *strides, last
        return place, 4 if len(rows) > 1 else 0

    def add_lists(self, index: Any, lengths: Any, old: Any, new: Any) -> Lists:
        """All lists of integers, and what is planned of the index."""
        lists, kinds = zip(*map(alike, (index, lengths, old, new)), strict=True)
        places = [self.add(rows, n != 1) for n, rows in enumerate(lists)]
        names = ("INDEX", "LIMITS", "OLD", "NEW")
        return Lists(
            tuple(number for place in places for number in place),
            self.plan(index),
            dict(zip(names, kinds, strict=True)),
            lists,
        )

    def plan(self, index: Sequence[Tensor]) -> int:
        """Where it is written which lengths and positions come from which index."""
        place, rows, entries = len(self.values), 0, 0
        for one in index:
            images, heads = (*one.shape[:-1], 1, 1)[:2]
            self.values += images, heads, one.shape[-1], rows, entries
            rows += images * heads
            entries += one.numel()
        return place


def alike(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
    """Integers of one dtype: of both, the narrow ones are copied."""
    if not rows:
        return rows, None
    if all(one.dtype == torch.int32 for one in rows):
        return rows, tl.int32
    return [one.long() for one in rows], tl.int64


def granule(*numbers: int) -> int:
    """The largest power of two, at most 16, that divides all."""
    together = 16
    for number in numbers:
        together |= number
    return together & -together


def kind_of(x: Tensor, count: int) -> tuple[int, ...]:
    """Heads, tokens and count, strides in bytes, bytes of a row; positions have 31 bits."""
    size, tokens = x.element_size(), min(x.shape[2], 2**31 - 1)
    strides = [s * size if n > 1 else 0 for s, n in zip(x.stride(), x.shape[:3], strict=False)]
    return x.shape[1], tokens, count if x.shape[1] else 0, *strides, x.shape[3] * size


def run(
    tensors: list[Tensor], targets: Sequence[Tensor], index: list[Tensor], lengths: list[Tensor],
    per_layer: int, fill: bool, inv_freq: Tensor | None, old: list[Tensor], new: list[Tensor],
    in_place: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Moves every tensor to its target, which in place is itself; returns lengths, positions."""
    counts, positions = rows_like(index)
    kinds = map(kind_of, tensors, slots_of(tensors, index, per_layer))
    layout = Layout(tensors, targets, list(kinds), tensors[0].shape[0])
    lists = layout.add_lists(index, lengths, old, new)
    work = Work(layout, index, tensors[0], inv_freq, fill, in_place)
    launch(
        compact, (work.programs, 1 + len(tensors)),
        _fill.integers(layout.values, tensors[0].device), inv_freq, counts, positions,
        per_layer, layout.batch, work.shares, len(index), work.most_rows, lists.plans,
        *lists.places,
        config=work.config, **work.constants, **lists.constants, IN_PLACE=in_place, FILL=fill,
    )  # fmt: skip
    return counts, positions


def slots_of(tensors: list[Tensor], index: list[Tensor], per_layer: int) -> list[int]:
    """How many slots the rows of each tensor have."""
    shared = len(index) == 1
    return [index[0 if shared else i // per_layer].shape[-1] for i in range(len(tensors))]


class Lists(NamedTuple):
    """Where the table has the lists of integers, what they are made of, and their memory."""

    places: tuple[int, ...]
    plans: int
    constants: dict[str, Any]
    held: tuple[Sequence[Tensor], ...]


class Work:
    """How much of it one program does, in which words, and how keys are turned."""

    def __init__(
        self, layout: Layout, index: list[Tensor], key: Tensor, inv_freq: Tensor | None,
        fill: bool, in_place: bool,
    ) -> None:  # fmt: skip
        words = tuple(sorted(set(layout.kinds.values()), reverse=True))
        widest, stable = max(kind[6] for kind in layout.kinds), in_place and not fill
        cut = cut_of(widest, layout.walks if stable else PROGRAMS)
        self.config = TABLE.choose(min(*words, 8), cut, capability(key.device))
        self.shares = 1 if stable else shares_of(layout, self.config.blocks["ROWS"], in_place)
        self.most_rows = max(one.shape[:-1].numel() for one in index)
        heads = (max(1, kind[0]) * max(1, blocks(kind[6], cut)) for kind in layout.kinds)
        programs = layout.batch * max(heads) * self.shares
        self.programs = max(programs, min(len(index) * self.most_rows, PROGRAMS), 1)
        name, bits, vector = None, None, 1
        if inv_freq is not None:
            name, bits = KEYS[key.dtype]
            size = key.element_size()
            vector = max(1, granule(*words, inv_freq.numel() * size) // size)
        self.constants: dict[str, Any] = {
            "BYTES": cut, "WORDS": words, "KEY": name, "BITS": bits, "VECTOR": vector
        }  # fmt: skip


def rows_like(index: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Lengths and positions, still empty; of several index tensors packed."""
    shapes = [index[0].shape[:-1], index[0].shape]
    if len(index) > 1:
        rows = sum(one.shape[:-1].numel() for one in index)
        shapes = [torch.Size([rows]), torch.Size([sum(one.numel() for one in index)])]
    lengths, positions = (index[0].new_empty(shape, dtype=torch.int64) for shape in shapes)
    return lengths, positions


def cut_of(widest: int, walks: int) -> int:
    """Bytes of a row that a program moves: less where walks are fewer than a GPU has room for."""
    cut = min(MOST_BYTES, triton.next_power_of_2(max(widest, 16)))
    while cut > LEAST_BYTES and walks * blocks(widest, cut) < PROGRAMS:
        cut //= 2
    return cut


def shares_of(layout: Layout, rows: int, in_place: bool) -> int:
    """Programs for one head of a tensor: enough for a GPU, and of few tiles each."""
    most = max(min(k[2], max(1, k[1] - k[2])) if in_place else k[2] for k in layout.kinds)
    tiles = max(1, blocks(most, rows))
    wanted = max(blocks(tiles, MOST_TILES), blocks(2 * PROGRAMS, max(1, layout.walks)))
    return min(tiles, wanted)
