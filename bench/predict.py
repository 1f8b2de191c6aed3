"""What an H200 should take for every bench case, written down before anyone measures it.

`python -m bench.predict` renews `bench/results/predictions-h200.json` and the table in NOTES.md, in
seconds and without a GPU.

The model of a call: its launches, one after another, and the longest of what goes on at once in
them. Bytes come at the speed of a copy, if there are blocks enough to ask for them. Products run at
the rate of the units that a kernel multiplies on, as many as it takes for one that was asked for,
and until the last wave of blocks is through: so many blocks per multiprocessor as registers and
shared memory admit. What follows a product element by element (exponentials, the choice of the
nearest) hides behind it where a multiprocessor holds several blocks, and adds to it where a block
is alone. A selection by digits comes before the rows that it selects.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from bench import cuda_kernels, kernels, report
from bench.kernels import MULTIPROCESSORS, PAGE, Call
from bench.predictions import FILE, Prediction, Times, known, measured
from bench.roofline import Roof, limit, seconds_to_move
from bench.tables import Table, number
from bench.work import Work, launches, of_call
from tokenkernels._op import tensors_in

import cuda_resources  # isort: skip  (bench.kernels has put tests/ into the path)
from cuda_resources import Uses  # isort: skip

MODEL = 3
"""Raised with every change of what is predicted, so that an outcome names what it was held to."""
BLOCK = re.compile(r"(?<=<!-- predictions -->\n).*(?=<!-- end of predictions -->)", re.DOTALL)
H200: Roof = {
    "cold": {"copy": {str(2**30): 4.3e12}, "read": {str(2**30): 4.3e12}},
    "gemm": {"bfloat16": 790e12, "float16": 790e12, "tf32": 400e12, "float32": 60e12},
    "fma": 60e12,
    "exp": 3.7e12,
    "launch_us": 3.0,
}
"""Supposed, until a run on one stands in `bench/results`."""
RATES = {"16 bits": "bfloat16", "tf32": "tf32", "float32": "float32"}
"""What a kernel multiplies in, and the product that its rate is known by."""
INSTRUCTIONS = H200["fma"] / 2
"""Of the units that multiply and add, per second."""
DRAWN_ALONE = 3.0
"""Times its even share of the bandwidth: what one multiprocessor draws while others are idle."""
REACHED = {True: 0.8, False: 0.6}
"""Of the tensor cores' rate, by groups of four warps or by single ones."""
ROUNDING = 1e-3
PER_SCORE = 3
"""Instructions of a search per score: the norm is added, the sum compared, the index chosen."""
PER_DIGIT = 4 * 8
"""Instructions per score that are selected among: four passes that count a digit."""


class Grid(NamedTuple):
    """What is known of a launch that does a call's work."""

    blocks: int
    together: int
    """Blocks that a multiprocessor holds."""
    reached: float = 1.0
    """Of the rate of the units that it multiplies on."""


class Plan(NamedTuple):
    """How a backend goes about a call."""

    launched: int
    grids: list[Grid]
    """Of those launches that share the work evenly; none where only values tell."""
    kind: str = "float32"
    products: float = 1
    """For each that was asked for."""
    selecting: int = 0
    """Blocks that select at once, where that comes first."""
    repeated: int = 1
    """How often exponentials are made."""


def predictions() -> Iterator[Prediction]:
    """Every cell of the bench on either backend."""
    built, grids, uses = kernels.compilations(), cuda_kernels.grids(), cuda_resources.table()[1]
    forward: dict[str, tuple[Prediction, ...]] = {}
    for call in kernels.recorded():
        found = (
            _prediction(call, "native", _native(call, grids, uses)),
            _prediction(call, "triton", _triton(call, built)),
        )
        if call.gradient:
            before = forward[str(call).removesuffix(" · +backward")]
            found = _both(before[0], found[0]), _both(before[1], found[1])
        else:
            forward[str(call)] = found
        yield from found


def work(call: Call) -> Work:
    """What a call must at least do."""
    dtype = str(call.dtype).removeprefix("torch.")
    if not call.gradient:
        return of_call(call.op, call.kwargs, call.cost, dtype)
    moved = sum(kernels.touched(launch) for launch, _ in call.launches) or call.cost[0]
    count = launches(call.op, call.kwargs, True)
    return Work(moved, 0, 2 * call.cost[1], dtype, launches=count)


def seconds(call: Call, needs: Work, plan: Plan) -> float:
    """The model."""
    launching = plan.launched * H200["launch_us"] / 1e6
    memory = seconds_to_move(H200, needs, "cold") * mean(starved(grid) for grid in plan.grids)
    slower = mean(unfilled(grid) / grid.reached for grid in plan.grids)
    products = needs.flops * plan.products / H200["gemm"][RATES[plan.kind]] * slower
    behind = plan.repeated * needs.exponentials / H200["exp"]
    behind += PER_SCORE * needs.compares / INSTRUCTIONS
    behind *= mean(map(unfilled, plan.grids))
    alone = any(grid.together == 1 for grid in plan.grids)
    at_once = products + behind if alone else max(products, behind)
    return launching + selection(call, plan) + max(memory, at_once)


def mean(factors: Iterable[float]) -> float:
    """1 where nothing is known."""
    found = list(factors)
    return statistics.mean(found) if found else 1.0


def waves(grid: Grid) -> float:
    """Blocks spread before they share a multiprocessor."""
    spread = min(grid.together, -(-grid.blocks // MULTIPROCESSORS))
    return grid.blocks / (MULTIPROCESSORS * spread)


def unfilled(grid: Grid) -> float:
    """How much longer it takes than if the last wave were full."""
    return math.ceil(waves(grid)) / waves(grid)


def starved(grid: Grid) -> float:
    """How much longer bytes take where few multiprocessors ask for them."""
    return max(1.0, MULTIPROCESSORS / (DRAWN_ALONE * grid.blocks))


def selection(call: Call, plan: Plan) -> float:
    """Seconds that it takes before rows can move; blocks of the same row share or repeat it."""
    if not plan.selecting or call.gradient:
        return 0.0
    share = min(plan.selecting, MULTIPROCESSORS) / MULTIPROCESSORS
    return float(PER_DIGIT * call.kwargs["scores"].numel() / (INSTRUCTIONS * share))


def _native(call: Call, grids: cuda_kernels.Grids, uses: Uses) -> Plan:
    name = call.op.name
    if (noted := grids.get(str(call))) is None:
        return Plan(launches(call.op, call.kwargs, call.gradient), [])
    work = [one for one in noted if one.kernel != "memset"]
    times = cuda_kernels.TENSOR_CORES.get(name)
    if times:
        work = [one for one in work if one.shared > cuda_kernels.TILES] or work
    else:
        work = [max(work, key=lambda one: one.blocks * one.threads)]
    held = [cuda_kernels.blocks_together(name, one, uses) for one in work]
    selecting = [one.blocks for one in noted if "select" in one.kernel] or [_rows(call)]
    if not times:
        found = [Grid(one.blocks, n) for one, n in zip(work, held, strict=True)]
        return Plan(len(noted), found, selecting=selecting[0])
    narrow = any(t.element_size() == 2 for t in tensors_in(call.kwargs))
    reached = [REACHED["search" in one.kernel and one.kernel.endswith("true>")] for one in work]
    found = [Grid(w.blocks, n, share) for w, n, share in zip(work, held, reached, strict=True)]
    width = re.search(r"aggregate_logits_kernel<.*, (\d+)>", work[0].kernel)
    repeated = _across(call, int(width[1])) if width else 1
    return Plan(len(noted), found, "16 bits", times[narrow], repeated=repeated)


def _triton(call: Call, built: dict[str, dict[str, Any]]) -> Plan:
    if not call.launches:
        return Plan(launches(call.op, call.kwargs, call.gradient), [])
    found = [(launch, built[kernels.key(job)]) for launch, job in call.launches]
    count = len(found) + call.copies
    work = [(launch, k) for launch, k in found if k["multiplies"] != "float32"]
    if not work:
        # Of launches that are given the same, the one of more blocks moves it.
        launch, k = max(found, key=lambda one: (kernels.touched(one[0]), math.prod(one[0].grid)))
        grid = Grid(math.prod(launch.grid), kernels.together(k))
        return Plan(count, [grid], selecting=_rows(call))
    grids = [
        Grid(math.prod(launch.grid), kernels.together(k), REACHED[k["groups"]])
        for launch, k in work
    ]
    launch, first = work[0]
    forward = call.op.name == "aggregate_logits" and not call.gradient
    repeated = _across(call, launch.config.blocks["CHANNELS"]) if forward else 1
    return Plan(count, grids, first["multiplies"], first["products"], repeated=repeated)


def _across(call: Call, width: int) -> int:
    """Blocks of channels, each of which makes all exponentials of the logits."""
    return -(-int(call.kwargs["value"].shape[2]) // width)


def _rows(call: Call) -> int:
    """Of scores that something is selected among."""
    return len(call.kwargs["scores"]) if call.op.name == "gather_topk" else 0


def _prediction(call: Call, backend: str, plan: Plan) -> Prediction:
    needs = work(call)
    words = f"{call}, {backend}: {plan.launched} launches, {needs.launches} declared"
    assert plan.launched <= needs.launches, words
    least, bound = limit(H200, needs)
    grid = max(plan.grids, key=unfilled, default=None)
    return Prediction(
        call.op.name, call.case.id, needs.dtype, call.gradient, backend, plan.launched,
        needs.moved, needs.flops, needs.exponentials, needs.compares, grid and grid.blocks,
        grid and round(waves(grid), 3), bound, _microseconds(least),
        _microseconds(seconds(call, needs, plan)),
    )  # fmt: skip


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 3)


def _both(forward: Prediction, backward: Prediction) -> Prediction:
    """A cell with a gradient times both; what bounds the longer one is named."""
    longer = max(forward, backward, key=lambda part: part.limit_us)
    added = ("launches", "bytes", "flops", "exponentials", "compares", "limit_us", "predicted_us")
    sums = {name: getattr(forward, name) + getattr(backward, name) for name in added}
    return Prediction(**(asdict(backward) | sums | {"limit": longer.limit}))


def table(found: list[Prediction], took: Times) -> Table:
    """Prediction, outcome and their ratio, a line per cell and backend."""
    columns = ["cell", "backend", "launches", "MB", "GFLOP", "waves", "limit", "limit µs"]
    table = Table("Predictions", [*columns, "predicted µs", "measured µs", "ratio"], [])
    for row in found:
        us = took.get((row.cell, row.backend))
        table.rows.append(
            [
                row.cell,
                row.backend,
                str(row.launches),
                number(row.bytes / 1e6),
                number(row.flops / 1e9) if row.flops else "",
                number(row.waves),
                row.limit,
                number(row.limit_us),
                number(row.predicted_us),
                number(us),
                number(us and us / row.predicted_us),
            ]
        )
    return table


def as_json(found: list[Prediction]) -> str:
    """One line per prediction, so that two models can be compared."""
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in found)
    head = f'{{\n "model": {MODEL},\n "roof": {json.dumps(H200)},\n'
    return f'{head} "predictions": [\n{lines}\n ]\n}}\n'


def out_of_date(found: list[Prediction]) -> list[str]:
    """What the committed predictions say otherwise. Counts of rows that are chosen by floating
    values may differ by a few between machines.
    """
    written = json.loads(FILE.read_text())
    if (written["model"], written["roof"]) != (MODEL, H200):
        return ["another model, or other rates"]
    before = {(row.cell, row.backend): row for row in known()}
    now = {(row.cell, row.backend): row for row in found}
    told = [f"{cell}, {backend}: gone" for cell, backend in before.keys() - now.keys()]
    for (cell, backend), row in now.items():
        if (old := before.get((cell, backend))) is None:
            told.append(f"{cell}, {backend}: not written")
            continue
        for name, value in asdict(row).items():
            was = getattr(old, name)
            numbers = isinstance(was, (int, float)) and isinstance(value, (int, float))
            if not (math.isclose(was, value, rel_tol=ROUNDING) if numbers else was == value):
                told.append(f"{cell}, {backend}: {name} {was} -> {value}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.predict", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="only tell what is out of date")
    options = parser.parse_args()
    found = list(predictions())
    if options.check:
        print("\n".join(out_of_date(found)) or "up to date")
        return
    FILE.write_text(as_json(found))
    text = report.as_markdown(table(found, measured())) + "\n"
    PAGE.write_text(BLOCK.sub(lambda _: text, PAGE.read_text()))


if __name__ == "__main__":
    main()
