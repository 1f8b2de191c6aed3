"""Sweeps the block shapes of an op's Triton kernels and prints the best entry of every table.

`python -m bench --tune OP`. One table at a time, the others as they are; a shape that does not
compile, or that gives other results, drops out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from bench.bench_ops import cells
from bench.contenders import Cell, contenders, judge, prepared, truth
from bench.gpu import timing
from bench.tables import Table, number


def tables_of(op: str) -> dict[str, Any]:
    """The tables that an op's module defines or takes from its family's."""
    from tokenkernels.triton._launch import Table as Shapes

    module = import_module(f"tokenkernels.triton.{op}")
    return {name: value for name, value in vars(module).items() if isinstance(value, Shapes)}


def sweep(op: str, seconds: float = 0.3) -> Table:
    """Microseconds of every case under every shape, the fastest of each table marked."""
    lines = []
    device = "cuda" if timing.has_gpu() else "cpu"
    for cell in cells(only=f"{op} ·", device=device):
        for name, table in tables_of(op).items():
            took = {str(c): _time(cell, table, c, seconds) for c in _shapes(table)}
            good = {shape: us for shape, us in took.items() if us is not None}
            for shape, us in sorted(good.items(), key=lambda item: item[1]):
                mark = "best" if us == min(good.values()) else ""
                lines.append([str(cell), name, shape, number(us), mark])
    return Table(f"Block shapes of {op}", ["cell", "table", "shape", "µs", ""], lines)


def _shapes(table: Any) -> Iterator[Any]:
    seen = []
    for config in [entry.config for entry in table.entries] + table.candidates:
        if config not in seen:
            seen.append(config)
            yield config


def _time(cell: Cell, table: Any, config: Any, seconds: float) -> float | None:
    table.forced = config
    try:
        with cell.mode():
            kwargs = cell.kwargs()
            ours = next(c for c in contenders(cell) if c.name == "triton")
            verdict = judge(cell, ours, kwargs, truth(cell, kwargs))
            if verdict.failed or verdict.left_out:
                print(f"{cell} {config}: {verdict.failed or verdict.left_out}", file=sys.stderr)
                return None
            copies = [kwargs] if cell.gradient else timing.rotated(kwargs)
            calls = [prepared(cell, copy, ours.function) for copy in copies]
            return 1e3 * timing.in_turns({"": calls}, seconds)[""].ms
    finally:
        table.forced = None
