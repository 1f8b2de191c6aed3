"""score_attention in Triton: one launch that measures each row's softmax, and one that scores keys.

`measure` streams keys past a tile of rows (split where there are few tiles) and keeps two numbers
per row; with a given logarithm it falls away. In `score` a program owns a block of keys, so that
nothing of the matrix is written: keys stay in shared memory while the rows of their group stream
past, or keys stream too where all rows of a head fit a tile or where heads are averaged before a
maximum. Pools up to 63 are averaged inside, over keys scored twice at the edges. Where long rows
would keep few programs busy they are shared out, and `finish` joins the shares in order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenkernels.triton._launch import Config, Entry, Table, aligned, blocks, capability, launch
from tokenkernels.triton._score_keys import finish, score
from tokenkernels.triton._score_measure import measure
from tokenkernels.triton._score_plan import (
    MOST_POOLED,
    Seen,
    Shape,
    power,
    scoring,
    splits_of,
    steps,
    strides,
)

MEASURE_TABLE = Table(
    [
        Entry(Config({"KEYS": 128, "LINES": 128, "DIM": 128}, 8), 128, (2,), 90),
        Entry(Config({"KEYS": 64, "LINES": 64, "DIM": 128}), 128, (2,)),
        Entry(Config({"KEYS": 64, "LINES": 64, "DIM": 256}), 256, (2,)),
        Entry(Config({"KEYS": 64, "LINES": 64, "DIM": 64}), bytes=(2,)),
        Entry(Config({"KEYS": 64, "LINES": 32, "DIM": 32})),
    ],
    "128 rows share the keys that stream past on sm_90; smaller ones where registers run out.",
)
TABLE = Table(
    [
        Entry(Config({"KEYS": 64, "LINES": 64, "DIM": 128}), 128, (2,), 100),
        Entry(Config({"KEYS": 128, "LINES": 64, "DIM": 128}), 128, (2,), 90),
        Entry(Config({"KEYS": 64, "LINES": 64, "DIM": 128}, 8), 128, (2,)),
        Entry(Config({"KEYS": 64, "LINES": 64, "DIM": 256}), 256, (2,)),
        Entry(Config({"KEYS": 64, "LINES": 64, "DIM": 64}), bytes=(2,)),
        Entry(Config({"KEYS": 64, "LINES": 32, "DIM": 32})),
    ],
    "Keys stay while rows stream past; of two programs one multiplies, one takes exponentials.",
)
"""64 or 128 keys stay in shared memory while 64 rows at a time stream past; two programs or more
share a multiprocessor, so that one multiplies while another takes exponentials. float32 goes by 32
elements: its operands are held in registers in two parts.
"""
FINISH_TABLE = Table(
    [Entry(Config({"COLUMNS": 128}, 8))],
    "128 columns are a full line; few numbers, so short programs.",
)


def score_attention(
    query: Tensor, key: Tensor, scale: float | None, causal: bool,
    query_positions: Tensor | None, key_lengths: Tensor | None,
    lse: Tensor | None, row_weights: Tensor | None,
    first_column: int, end_column: int, heads: str, sum: bool, max: bool, pool: int,
) -> Tensor:  # fmt: skip
    """One launch with `lse`, two without; one more where rows are shared out or `pool` is wide."""
    columns = end_column - first_column
    lines = {"mean": (), "group": (key.shape[1],), "none": (query.shape[1],)}[heads]
    results = (2,) if sum and max else ()
    out = query.new_empty((*results, query.shape[0], *lines, columns), dtype=torch.float32)
    if out.numel() == 0:
        return out
    query, key = aligned(query), aligned(key)
    shape = Shape.of(query, key)
    factor = (shape.dim**-0.5 if scale is None else scale) / math.log(2)
    seen = Seen(query_positions, key_lengths, causal)
    peak, total, splits = None, None, 1
    if lse is None:
        peak, total, splits = _measure(shape, query, key, factor, seen)
    inside = pool if pool <= MOST_POOLED else 1
    plan = scoring(shape, TABLE, heads, columns, max, inside)
    direct = pool == inside and plan.parts == 1
    inside = inside if direct else 1
    target = out if direct else out.new_empty((plan.parts, *out.shape))
    config, units, per_head = plan.config, plan.units, heads == "none"
    programs = units.count * plan.parts * blocks(columns, config.blocks["KEYS"] - inside + 1)
    launch(
        score, (query.shape[0] * programs,),
        query, key, seen.positions, seen.lengths, lse, peak, total, row_weights, target,
        factor, 1 / units.averaged, query.shape[0], shape.key_heads, shape.group, shape.rows,
        shape.keys, splits, plan.parts, first_column, columns, inside, units.count,
        units.key_heads, units.tiles, units.per_key_head, shape.group if per_head else 1,
        seen.position_steps, seen.length_step, steps(lse, 3), steps(row_weights, 2),
        strides(query), strides(key), shape.dim,
        config=config, aligned=shape.aligned, WHOLE=shape.whole(config), KEPT=plan.kept,
        MEAN_FIRST=plan.mean_first, SPLITS=power(splits), CAUSAL=causal, SUM=sum, MAX=max,
        OUT=config.blocks["HEADS"] if per_head else 1, POOLED=inside > 1,
        PRECISION=shape.precision,
    )  # fmt: skip
    if not direct:
        _finish(target, out, plan.parts, columns, sum, max, pool)
    return out


def _measure(
    shape: Shape, query: Tensor, key: Tensor, factor: float, seen: Seen
) -> tuple[Tensor, Tensor, int]:
    """Peak and sum of exponentials of every row, for each split of the keys."""
    config = shape.tiled(MEASURE_TABLE)
    lines = config.blocks["ROWS"] * config.blocks["HEADS"]
    keys = min(config.blocks["KEYS"], max(2 * lines, 128 // shape.element))
    config.blocks["KEYS"] = keys
    splits, each = splits_of(shape, config)
    head_tiles, row_blocks = shape.tiles(config)
    whole = shape.whole(config)
    config = shape.staged(config, lines, lines * whole, keys + lines * (not whole), 2)
    peak = query.new_empty((*query.shape[:3], splits), dtype=torch.float32)
    total = torch.empty_like(peak)
    launch(
        measure, (query.shape[0] * shape.key_heads * head_tiles * row_blocks * splits,),
        query, key, seen.positions, seen.lengths, peak, total,
        factor, shape.key_heads, shape.group, shape.rows, shape.keys, splits, each,
        seen.position_steps, seen.length_step, strides(query), strides(key), shape.dim,
        config=config, aligned=shape.aligned, WHOLE=whole, PRECISION=shape.precision,
        CAUSAL=seen.causal,
    )  # fmt: skip
    return peak, total, splits


def _finish(
    parts: Tensor, out: Tensor, count: int, columns: int, sum: bool, max: bool, pool: int
) -> None:
    """Joins the shares of rows, and averages."""
    lines = out.numel() // columns
    totals = lines // (sum + max) * sum
    block = FINISH_TABLE.choose(4, columns, capability(out.device))
    launch(
        finish, (lines * blocks(columns, block.blocks["COLUMNS"]),),
        parts, out, count, lines, totals, columns, pool,
        config=block, aligned=False,
    )  # fmt: skip
