"""One cell of the GPU bench: all contenders checked on the very input, then replayed in turns."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.bench_ops import cells
from bench.contenders import Cell, contenders, judge, prepared, truth
from bench.gpu import timing
from bench.roofline import Roof, limit
from bench.work import Work, of_call


@dataclass
class Row:
    """What one contender did: by inputs that rotate, so that the cache holds none, and by the same
    one again, where that is another thing.
    """

    contender: str
    role: str
    failed: str = ""
    left_out: str = ""
    ms: float | None = None
    warm_ms: float | None = None
    how: str = ""
    eager_ms: float | None = None
    launches: int | None = None
    extra_bytes: int | None = None
    bytes: float | None = None
    flops: float | None = None
    bound: str = ""
    limit_ms: float | None = None
    warm_limit_ms: float | None = None
    roof_percent: float | None = None
    warm_roof_percent: float | None = None
    times_fastest_peer: float | None = None


def ordered(dry: bool) -> list[Cell]:
    """Every op's first case first, in bfloat16 and float32, then its others, then gradients."""
    device = "cuda" if timing.has_gpu() else "cpu"
    found = cells(device=device)
    if dry:
        return [c for c in found if c.op.name == "merge_backward"][:1]
    place = {id(cell): 0 for cell in found}
    seen: dict[tuple[str, Any, bool], int] = {}
    for cell in found:
        key = (cell.op.name, cell.dtype, cell.gradient)
        place[id(cell)] = seen[key] = seen.get(key, -1) + 1
    return sorted(found, key=lambda c: (place[id(c)], c.gradient, c.dtype != torch.bfloat16))


def measure(cell: Cell, roof: Roof, seconds: float, compiled: bool) -> list[Row]:
    """The rows of one cell: ours and the eager peers, or ours and the compiled ones."""
    torch._dynamo.reset()
    gc.collect()
    with cell.mode():
        kwargs = cell.kwargs()
        known = truth(cell, kwargs)
        written = sum(t.nbytes for t in known.low)
        rows: list[Row] = []
        calls: dict[tuple[str, str], list[timing.Call]] = {}
        for contender in contenders(cell):
            if contender.role == "peer" and contender.compiled != compiled:
                continue
            if contender.role == "reference":
                continue
            row = Row(contender.name, contender.role)
            rows.append(row)
            verdict = judge(cell, contender, kwargs, known)
            row.failed, row.left_out = verdict.failed, verdict.left_out
            if not (row.failed or row.left_out):
                copies = timing.rotated(kwargs)
                cold = [prepared(cell, k, contender.function) for k in copies]
                calls[row.contender, "cold"] = cold
                if row.role == "ours" and len(cold) > 1:
                    calls[row.contender, "warm"] = cold[:1]
        del known
        failed: dict[tuple[str, str], str] = {}
        took = timing.in_turns(calls, seconds, failed)
        cost = None if cell.gradient else cell.op.cost(kwargs)
    for row in rows:
        row.failed = row.failed or failed.get((row.contender, "cold"), "")
    fill_in(rows, took)
    if cost and roof:
        dtype = str(cell.dtype).removeprefix("torch.")
        fill_in_limits(rows, replace(of_call(cell.op, kwargs, cost, dtype), written=written), roof)
    return rows


def fill_in(rows: list[Row], took: dict[tuple[str, str], timing.Timed]) -> None:
    """Times, and how many times faster than the fastest peer each is."""
    for row in rows:
        if found := took.get((row.contender, "cold")):
            row.ms, row.how, row.eager_ms = found.ms, found.how, found.eager_ms
            row.launches, row.extra_bytes = found.launches, found.extra_bytes
        if again := took.get((row.contender, "warm")):
            row.warm_ms = again.ms
    peers = [row.ms for row in rows if row.role == "peer" and row.ms]
    for row in rows:
        if row.ms and peers:
            row.times_fastest_peer = min(peers) / row.ms


def fill_in_limits(rows: list[Row], needs: Work, roof: Roof) -> None:
    """By what was measured on this GPU, for inputs that are cold and that are warm, and the share
    of either limit that the time with such inputs reaches.
    """
    cold, warm = (limit(roof, needs, cache=cache) for cache in ("cold", "warm"))
    for row in rows:
        row.bytes, row.flops, row.bound = needs.moved, needs.flops, cold.bound
        row.limit_ms, row.warm_limit_ms = 1e3 * cold.seconds, 1e3 * warm.seconds
        row.roof_percent = 100 * row.limit_ms / row.ms if row.ms else None
        row.warm_roof_percent = 100 * row.warm_limit_ms / row.warm_ms if row.warm_ms else None
