"""Sweeps the block shapes of an op's Triton kernels and prints the best entry of every table.

`python -m bench --tune OP`. One table at a time, the others as they are; a shape that does not
compile, or that gives other results, drops out.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

from bench.bench_ops import cells
from bench.contenders import Cell, Contender, Truth, backend, fresh, judge, prepared, truth
from bench.gpu import timing
from bench.tables import Table, number

MOST_WARPS = 16


def sweep(op: str, seconds: float = 0.3) -> Table:
    """Microseconds of every case under every shape, the fastest of each table marked."""
    found = cells(only=f"{op} ·", device="cuda" if timing.has_gpu() else "cpu")
    lines = [line for cell in found for line in sweep_cell(cell, seconds)]
    if not lines:
        raise SystemExit(f"bench: {op} has no case to sweep: none of the benchmark runs on Triton")
    return Table(f"Block shapes of {op}", ["cell", "table", "shape", "µs", ""], lines)


def sweep_cell(cell: Cell, seconds: float) -> list[list[str]]:
    """A line for every shape of every table that decides in this cell, the fastest first."""
    with cell.mode():
        kwargs = cell.kwargs()
        if reason := cell.op.why_not("triton", cell.device, kwargs):
            print(f"{cell}: {reason}", file=sys.stderr)
            return []
        compare = cell.op.check_gradients if cell.gradient else cell.op.check
        ours = Contender("triton", "ours", backend(cell.op, "triton"), compare)
        known = truth(cell, kwargs)
        choices = asked(prepared(cell, fresh(cell, kwargs), ours.function))
        if not choices:
            raise SystemExit(f"bench: {cell} asks no table of block shapes")
        names, lines = named(choices), []
        for table, chosen in choices.items():
            took = {}
            for config in shapes(table, chosen):
                us = _time(cell, ours, kwargs, known, table, config, seconds)
                if us is not None:
                    took[str(config)] = us
            for shape, us in sorted(took.items(), key=lambda item: item[1]):
                mark = "best" if us == min(took.values()) else ""
                lines.append([str(cell), names[table], shape, number(us), mark])
    return lines


def asked(call: Callable[[], Any]) -> dict[Any, Any]:
    """The tables that a call asks for shapes, forward and backward, with their answers."""
    from tokenkernels.triton._launch import recording

    with recording() as record:
        call()
    return record.choices


def named(tables: Iterable[Any]) -> dict[Any, str]:
    """Where each stands; what a family shares stands first in its own module."""
    import tokenkernels.triton as room

    modules = [
        import_module(f"{room.__name__}.{m.name}") for m in pkgutil.iter_modules(room.__path__)
    ]
    return {
        table: next(
            f"{module.__name__.rpartition('.')[2]}.{name}"
            for module in modules
            for name, value in vars(module).items()
            if value is table
        )
        for table in tables
    }


def shapes(table: Any, chosen: Any) -> Iterator[Any]:
    """What the table holds, and the neighbours of what it chose: one block or the warps halved or
    doubled, a stage less or more.
    """
    near = [
        replace(chosen, blocks=chosen.blocks | {name: size})
        for name, block in chosen.blocks.items()
        for size in (block // 2, 2 * block)
        if size
    ]
    near += [
        replace(chosen, warps=warps)
        for warps in (chosen.warps // 2, 2 * chosen.warps)
        if 1 <= warps <= MOST_WARPS
    ]
    near += [replace(chosen, stages=s) for s in (chosen.stages - 1, chosen.stages + 1) if s]
    seen = []
    for config in [chosen, *(e.config for e in table.entries), *table.candidates, *near]:
        if config not in seen:
            seen.append(config)
            yield config


def _time(
    cell: Cell, ours: Contender, kwargs: dict[str, Any], known: Truth, table: Any, config: Any,
    seconds: float,
) -> float | None:  # fmt: skip
    """Microseconds of the cell with this shape; None where it fails, which is told."""
    table.forced = config
    try:
        verdict = judge(cell, ours, kwargs, known)
        failed = {"": verdict.failed}
        if not verdict.failed:
            copies = [kwargs] if cell.gradient else timing.rotated(kwargs)
            calls = [prepared(cell, copy, ours.function) for copy in copies]
            found = timing.in_turns({"": calls}, seconds, failed)
            if found:
                return 1e3 * found[""].ms
        print(f"{cell} {config}: {failed['']}", file=sys.stderr)
        if timing.is_fatal(failed[""]):
            raise SystemExit("bench: CUDA gives nothing but errors in this process any more")
        return None
    finally:
        table.forced = None
