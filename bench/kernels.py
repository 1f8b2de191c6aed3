"""Writes into NOTES.md what the compiler made of the Triton kernels and what an H200 should take
for a call; `python -m bench.kernels`, without a GPU.

Of every op the first bench case and that of the largest inputs, in bfloat16 and float32.
Measured times stand beside where `bench/results` holds a run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.tables import Table, number
from tokenkernels import ops
from tokenkernels._case import Make
from tokenkernels._op import OPS, Case, Op, tensors_in

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import ahead_of_time as ahead  # noqa: E402

PAGE = Path(__file__).parent / "NOTES.md"
BLOCK = re.compile(r"(?<=<!-- kernels -->\n).*(?=<!-- end of kernels -->)", re.DOTALL)
CAPABILITY = 90
BYTES_PER_SECOND = 4.3e12
RATES = {"16 bits": 790e12, "tf32": 400e12, "float32": 60e12}
"""Of an H200, by what a kernel multiplies: tensor cores of 16 bits or of TF32, or FMA."""
LAUNCH_US = 3.0
REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 227 << 10, 64, 32
"""Of one multiprocessor; a program takes 1 KB of shared memory besides its own."""


class Indices(ahead.Shapes):
    """Draws integers with their values, which tell how many rows move; nothing else has any."""

    def __init__(self, seed: str, dtype: torch.dtype) -> None:
        super().__init__(seed, dtype)
        self.device = "cpu"

    randint, permutation, bool = Make.randint, Make.permutation, Make.bool


@dataclass
class Call:
    """One op on one bench case, forward or backward."""

    op: Op
    case: Case
    dtype: torch.dtype
    gradient: bool
    kwargs: dict[str, Any]
    launches: list[tuple[Any, Any]] = field(default_factory=list)
    copies: int = 0
    cost: tuple[float, float] | None = None
    size: int = 0

    def __str__(self) -> str:
        """As the bench names its cells."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op.name} · {self.case.id} · {dtype}" + self.gradient * " · +backward"


def recorded() -> Iterator[Call]:
    """The calls of the table, with every launch and the compilation that it needs."""
    for op in OPS.values():
        cases = [case for case in op.cases if "bench" in case.tags]
        if "triton" not in op._kinds:
            continue
        for dtype in (torch.bfloat16, torch.float32):
            drawn = [
                (case, case.make(ahead.Shapes(case.id, dtype)))
                for case in cases
                if dtype in case.dtypes
            ]
            if not drawn:
                continue
            others = sorted(drawn[1:], key=lambda pair: _size(pair[1]))
            for case, kwargs in drawn[:1] + others[-1:]:
                yield from _calls(op, case, dtype, kwargs)


def _size(kwargs: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(list(kwargs.values())))


def _cost(op: Op, kwargs: dict[str, Any]) -> tuple[float, float] | None:
    try:
        return op.cost(kwargs)
    except RuntimeError:  # only values tell
        return None


def _calls(op: Op, case: Case, dtype: torch.dtype, kwargs: dict[str, Any]) -> Iterator[Call]:
    """Forward and backward, as far as shapes without values tell what is launched."""
    cost = _cost(op, kwargs) or _cost(op, case.make(Indices(case.id, dtype)))
    dry = ahead.launches(op, kwargs, "meta", CAPABILITY)
    for gradient in (False, True):
        try:
            launches = next(dry)
        except RuntimeError as error:
            if not ahead.only_values_tell(error):
                raise
            return
        call = Call(op, case, dtype, gradient, kwargs, cost=None if gradient else cost)
        call.launches = [(x, ahead.described(x, CAPABILITY)) for x in launches.launches]
        call.copies, call.size = len(launches.copies), _size(kwargs)
        if call.launches:
            yield call


def together(built: dict[str, Any]) -> int:
    """How many programs a multiprocessor holds at once."""
    registers = -(-built["registers"] // 8) * 8 * 32 * built["warps"]
    shared = built["shared"] + 1024
    return min(REGISTERS // registers, SHARED // shared, WARPS // built["warps"], PROGRAMS)


def rate_of(built: dict[str, Any]) -> tuple[str, float]:
    """What a kernel multiplies with, and how often it does for each product that is asked for."""
    kinds = " ".join(built["mma"])
    if "bf16" in kinds or "f16.f16" in kinds:
        return "16 bits", 3.0 if built["constants"].get("PARTS") == 2 else 1.0
    if "tf32" in kinds:
        return "tf32", 3.0 if built["constants"].get("PRECISION") == "tf32x3" else 1.0
    return "float32", 1.0


def touched(launch: Any) -> int:
    """Bytes of all tensors that a launch is given, each once."""
    flat = (a for b in launch.arguments for a in (b if isinstance(b, tuple) else (b,)))
    return sum({id(a): a.nbytes for a in flat if isinstance(a, torch.Tensor)}.values())


def predicted(call: Call, built: dict[str, Any]) -> tuple[str, float]:
    """What limits a call, and microseconds: launches, then memory or arithmetic."""
    moved, flops = call.cost or (sum(touched(launch) for launch, _ in call.launches), 0.0)
    kinds = [rate_of(built[repr(job)]) for _, job in call.launches]
    kind, times = min(kinds, key=lambda pair: list(RATES).index(pair[0]))
    memory, arithmetic = 1e6 * moved / BYTES_PER_SECOND, 1e6 * times * flops / RATES[kind]
    start = LAUNCH_US * (len(call.launches) + call.copies)
    longest = max((start, "launches"), (memory, "memory"), (arithmetic, f"products, {kind}"))
    return longest[1], start + max(memory, arithmetic)


def calls_table(calls: list[Call], built: dict[str, Any], measured: dict[str, float]) -> Table:
    columns = ["call", "launches", "MB", "GFLOP", "limit", "predicted µs", "measured µs"]
    table = Table("Calls", columns, [])
    for call in calls:
        moved, flops = call.cost or (sum(touched(launch) for launch, _ in call.launches), None)
        limit, us = predicted(call, built)
        table.rows.append(
            [
                str(call),
                str(len(call.launches) + call.copies),
                number(moved / 1e6),
                number(flops and flops / 1e9),
                limit,
                number(us),
                number(measured.get(str(call))),
            ]
        )
    return table


def kernels_table(calls: list[Call], built: dict[str, Any]) -> Table:
    """Every compilation of these calls once, at the first of them that launches it."""
    columns = ["kernel", "call", "blocks", "warps", "registers", "shared KB", "per SM", "programs"]
    table = Table("Kernels", [*columns, "MB", "reason"], [])
    seen: set[str] = set()
    for call in calls:
        behind_a_table = 2 * sum(touched(launch) for launch, _ in call.launches) < call.size
        for launch, job in call.launches:
            if repr(job) in seen:
                continue
            seen.add(repr(job))
            k = built[repr(job)]
            table.rows.append(
                [
                    job.kernel.removeprefix("tokenkernels.triton."),
                    str(call),
                    " × ".join(map(str, launch.config.blocks.values())),
                    str(k["warps"]),
                    str(k["registers"]),
                    number(k["shared"] / 1024),
                    str(together(k)),
                    str(math.prod(launch.grid)),
                    "" if behind_a_table else number(touched(launch) / 1e6),
                    launch.config.reason,
                ]
            )
    return table


def measurements(backend: str) -> dict[str, float]:
    """Microseconds of a backend by cell, from whatever GPU was measured last."""
    found: dict[str, float] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*/gpu.jsonl")):
        for line in path.read_text().splitlines():
            cell = json.loads(line)
            for row in cell.get("rows") or []:
                if row["contender"] == backend and row["ms"]:
                    found[cell["cell"]] = 1e3 * row["ms"]
    return found


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__).parse_args()
    ops.load()
    calls = list(recorded())
    jobs = {repr(job): job for call in calls for _, job in call.launches}
    with multiprocessing.Pool(2) as pool:
        built = dict(zip(jobs, pool.map(ahead.compiled, jobs.values(), 1), strict=True))
    tables = calls_table(calls, built, measurements("triton")), kernels_table(calls, built)
    text = "\n\n".join(report.as_markdown(table) for table in tables) + "\n"
    PAGE.write_text(BLOCK.sub(lambda found: text, PAGE.read_text()))


if __name__ == "__main__":
    main()
