"""Every op × bench case × dtype × backend × peer of the registry: checked on that very input, then
timed in turns; names no op.

`pytest bench/bench_ops.py --benchmark-json out.json` runs the cells one by one, `python -m bench`
within a budget of time.
"""

from __future__ import annotations

import atexit
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import tokenkernels.ops
from bench import roofline
from bench.contenders import Cell, Kwargs, contenders, judge, names, prepared, truth
from bench.settings import give_back_memory, keep_freed_memory
from bench.timing import Others, alternate, extra_memory
from bench.work import Work
from tokenkernels._op import OPS, tensors_in

tokenkernels.ops.load()
atexit.register(gc.unfreeze)  # what is still frozen at the end is reported as leaked
DTYPES = (torch.float32, torch.bfloat16)
LEAST_SECONDS = 2.5
"""Time kept for each cell that is still to come before another function is compiled."""


@dataclass
class Row:
    """What one contender did in one cell; sizes in bytes, rates per second."""

    op: str
    case: str
    dtype: str
    gradient: bool
    contender: str
    role: str
    note: str = ""
    failed: str = ""
    left_out: str = ""
    ms: float | None = None
    bytes: float | None = None
    flops: float | None = None
    gb_per_s: float | None = None
    roof_percent: float | None = None
    bound: str = ""
    times_fastest_peer: float | None = None
    extra_bytes: float | None = None
    others_percent: float | None = None
    samples_ms: list[float] = field(default_factory=list)


def cells(quick: bool = False, only: str = "", device: str = "cpu") -> list[Cell]:
    """The first case of every op in each dtype, forward and with gradients, then the second ones,
    and so on; when `quick`, the first ones in float32 only.

    `only` keeps the cells in whose name it stands.
    """
    cases = {op: [case for case in op.cases if "bench" in case.tags] for op in OPS.values()}
    found = [
        Cell(op, cases[op][place], dtype, gradient, device)
        for place in range(1 if quick else max(map(len, cases.values())))
        for gradient in (False, True)
        for dtype in (DTYPES[:1] if quick else DTYPES)
        for op in OPS.values()
        if place < len(cases[op])
        and dtype in cases[op][place].dtypes
        and (op.differentiable or not gradient)
    ]
    return [cell for cell in found if only in str(cell)]


def blank(cell: Cell, contender: str, role: str, **more: Any) -> Row:
    dtype = str(cell.dtype).removeprefix("torch.")
    return Row(cell.op.name, cell.case.id, dtype, cell.gradient, contender, role, **more)


def measure(
    cell: Cell, roof: dict[str, Any], seconds: float, compile_until: float = 1e9
) -> list[Row]:
    """The rows of one cell. After `compile_until` seconds nothing more is compiled."""
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()  # or every collection goes through all that torch.compile has loaded
    give_back_memory()
    start = time.perf_counter()
    with cell.mode():
        kwargs = cell.kwargs()
        rows, calls, written = admit(cell, kwargs, start + compile_until)
        left = max(seconds - (time.perf_counter() - start), seconds / 4)
        moved, flops = (0, 0) if cell.gradient else cell.op.cost(kwargs)
        copies = roofline.memory_calls(moved, moved / 2 if "inplace" in cell.case.tags else written)
        products = roofline.product_calls(cell.dtype) if flops else {}
        others = Others()
        samples = alternate(calls | copies | products, left) if calls else {}
        fill_in_times(rows, samples, others.percent())
        fill_in_memory(rows, calls, tensors_in(kwargs))
    if samples and (moved or flops):
        memory = sum(statistics.median(samples[name]) for name in copies)
        if products:
            product = min(t for name in products for t in samples[name])
            roof = roofline.raised(roof, rows[0].dtype, product)
        work = Work(flops=flops, dtype=rows[0].dtype, launches=1)
        limit = roofline.limit(roof, work, cache="warm", memory=memory)
        fill_in_costs(rows, moved, flops, limit)
    return rows


def admit(
    cell: Cell, kwargs: Kwargs, compile_until: float
) -> tuple[list[Row], dict[str, Callable[[], Any]], int]:
    """A row for everyone, the calls of those who passed their comparison, and the bytes that the
    outputs take.
    """
    known = truth(cell, kwargs)
    rows: list[Row] = []
    calls: dict[str, Callable[[], Any]] = {}
    for contender in contenders(cell):
        if contender.role == "reference" and any(row.role == "peer" for row in timed(rows, calls)):
            continue  # it is slow, and stands in only where there is no peer
        row = blank(cell, contender.name, contender.role, note=contender.note)
        rows.append(row)
        if contender.compiled and time.perf_counter() > compile_until:
            row.left_out = "no time left to compile it"
            continue
        verdict = judge(cell, contender, kwargs, known)
        row.failed, row.left_out = verdict.failed, verdict.left_out
        if not (row.failed or row.left_out):
            calls[contender.name] = prepared(cell, kwargs, contender.function)
    return rows, calls, sum(t.nbytes for t in known.low)


def timed(rows: list[Row], calls: dict[str, Callable[[], Any]]) -> list[Row]:
    return [row for row in rows if row.contender in calls]


def fill_in_memory(
    rows: list[Row], calls: dict[str, Callable[[], Any]], inputs: list[torch.Tensor]
) -> None:
    """What our call and that of the fastest peer take beyond inputs and outputs."""
    held = {t.untyped_storage().data_ptr() for t in inputs}

    def returned(outputs: Any) -> int:
        return sum(
            t.nbytes for t in tensors_in(outputs) if t.untyped_storage().data_ptr() not in held
        )

    fastest = fastest_rival(rows)
    for row in rows:
        if row.ms and (row.role == "ours" or row is fastest):
            row.extra_bytes = extra_memory(calls[row.contender], returned)


def fill_in_times(rows: list[Row], samples: dict[str, list[float]], others: float | None) -> None:
    """Medians, and how many times faster than the fastest peer each is."""
    for row in rows:
        row.samples_ms = [round(1e3 * s, 6) for s in samples.get(row.contender, [])]
        if row.samples_ms:
            row.ms, row.others_percent = statistics.median(row.samples_ms), others
    fastest = fastest_rival(rows)
    for row in rows:
        if row.ms and fastest and fastest.ms:
            row.times_fastest_peer = fastest.ms / row.ms


def fastest_rival(rows: list[Row]) -> Row | None:
    """The fastest peer; where none was timed the reference stands in for it."""
    for role in ("peer", "reference"):
        if timed := [row for row in rows if row.role == role and row.ms]:
            return min(timed, key=lambda row: row.ms or 0.0)
    return None


def fill_in_costs(rows: list[Row], moved: float, flops: float, limit: roofline.Limit) -> None:
    """Shares of the roof: the seconds that are needed at least, over those taken."""
    for row in rows:
        row.bytes, row.flops, row.bound = moved, flops, limit.bound
        if row.ms:
            row.gb_per_s = moved / row.ms / 1e6
            row.roof_percent = 100 * limit.seconds / (row.ms / 1e3)


def run(todo: list[Cell], roof: dict[str, Any], seconds: float) -> Iterator[tuple[Cell, list[Row]]]:
    """All cells within about `seconds`, each with its rows; what no time is left for says so."""
    start = time.perf_counter()
    for number, cell in enumerate(todo):
        left, ahead = seconds - (time.perf_counter() - start), len(todo) - number
        if left <= 0:
            yield cell, [blank(cell, name, "", left_out="no time left") for name in names(cell)]
            continue
        yield cell, measure(cell, roof, left / ahead, left - LEAST_SECONDS * ahead)


class Clock:
    """A clock that stands still until it is told what a call took: how pytest-benchmark is given
    times measured in turns.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


@functools.lru_cache(maxsize=1)
def measured(cell: Cell) -> dict[str, Row]:
    return {row.contender: row for row in measure(cell, measured_roof(), seconds=3.0)}


@functools.cache
def measured_roof() -> dict[str, Any]:
    keep_freed_memory()
    return roofline.measure()


def pytest_generate_tests(metafunc: Any) -> None:
    """A test for each contender of each cell. Only here is pytest at hand."""
    import pytest

    clocked = pytest.mark.benchmark(timer=CLOCK.read)
    meetings = [
        pytest.param(cell, name, marks=clocked, id=f"{cell}-{name}".replace(" · ", "-"))
        for cell in cells()
        for name in names(cell)
    ]
    metafunc.parametrize(("cell", "name"), meetings)


def test_speed(benchmark: Any, cell: Cell, name: str) -> None:
    import pytest

    row = measured(cell).get(name)
    if row is None or row.left_out:
        pytest.skip(row.left_out if row else "peers stand in its place")
    assert not row.failed, row.failed
    taken = iter(row.samples_ms)
    benchmark.group = str(cell)
    benchmark.extra_info |= {k: v for k, v in asdict(row).items() if k != "samples_ms"}
    benchmark.pedantic(
        CLOCK.advance, setup=lambda: ((next(taken) / 1e3,), {}), rounds=len(row.samples_ms)
    )
