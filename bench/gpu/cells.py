"""One cell of the GPU bench: all contenders checked on the very input, then replayed in turns."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch

from bench.bench_ops import cells
from bench.contenders import Cell, contenders, judge, prepared, truth
from bench.gpu import roofs, timing


@dataclass
class Row:
    """What one contender did."""

    contender: str
    role: str
    failed: str = ""
    left_out: str = ""
    ms: float | None = None
    how: str = ""
    eager_ms: float | None = None
    launches: int | None = None
    extra_bytes: int | None = None
    bytes: float | None = None
    flops: float | None = None
    limit_ms: float | None = None
    roof_percent: float | None = None
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


def measure(cell: Cell, roof: dict[str, Any], seconds: float, compiled: bool) -> list[Row]:
    """The rows of one cell: ours and the eager peers, or ours and the compiled ones."""
    torch._dynamo.reset()
    gc.collect()
    with cell.mode():
        kwargs = cell.kwargs()
        known = truth(cell, kwargs)
        written = sum(t.nbytes for t in known.low)
        rows, calls = [], {}
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
                calls[row.contender] = [prepared(cell, k, contender.function) for k in copies]
        del known
        moved, flops = (0.0, 0.0) if cell.gradient else cell.op.cost(kwargs)
        failed: dict[str, str] = {}
        took = timing.in_turns(calls, seconds, failed)
    limit = _limit(roof, moved, written, flops, str(cell.dtype).removeprefix("torch."))
    for row in rows:
        row.failed = row.failed or failed.get(row.contender, "")
    fill_in(rows, took, moved, flops, limit)
    return rows


def _limit(roof: dict[str, Any], moved: float, written: float, flops: float, dtype: str) -> float:
    """Milliseconds that bytes or arithmetic need at least, by what was measured on this GPU; 0
    where nothing was. Arithmetic in float32 counts at the fastest of what kernels do: FMA, or on
    tensor cores three products of its 16-bit parts for one.
    """
    if not roof:
        return 0.0
    copied = min(moved, 2 * min(written, moved))
    memory = roofs.seconds_at(roof, "copy", copied) if copied else 0.0
    memory += roofs.seconds_at(roof, "read", moved - copied) if moved > copied else 0.0
    rates = roof["gemm"]
    wide = max(rates["float32"], rates["bfloat16"] / 3)
    rate = wide if dtype == "float32" else rates.get(dtype, wide)
    return 1e3 * max(memory, flops / rate)


def fill_in(
    rows: list[Row], took: dict[str, Any], moved: float, flops: float, limit: float
) -> None:
    for row in rows:
        if found := took.get(row.contender):
            row.ms, row.how, row.eager_ms = found.ms, found.how, found.eager_ms
            row.launches, row.extra_bytes = found.launches, found.extra_bytes
            if limit:
                row.bytes, row.flops, row.limit_ms = moved, flops, limit
                row.roof_percent = 100 * limit / found.ms
    peers = [row.ms for row in rows if row.role == "peer" and row.ms]
    for row in rows:
        if row.ms and peers:
            row.times_fastest_peer = min(peers) / row.ms
