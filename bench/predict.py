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
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from bench import cuda_kernels, kernels, report
from bench.kernels import PAGE, Call
from bench.predictions import FILE, Prediction, Times, known, measured
from bench.roofline import Roof, limit, seconds_to_move
from bench.tables import Table, number
from bench.work import Work, launches, of_call
from tokenkernels._op import tensors_in

MODEL = 1
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
MULTIPROCESSORS = 132
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
    """What is known of the launch that most of a call's work is in."""

    blocks: int | None
    """None where nothing but a GPU or values tell."""
    together: int
    """Blocks that a multiprocessor holds."""
    kind: str = "float32"
    products: float = 1
    reached: float = 1.0


def predictions() -> Iterator[Prediction]:
    """Every cell of the bench on either backend."""
    built = kernels.compilations()
    forward: dict[str, tuple[Prediction, ...]] = {}
    for call in kernels.recorded():
        found = _native(call), _triton(call, built)
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


def seconds(call: Call, needs: Work, launched: int, grid: Grid) -> float:
    """The model."""
    memory = seconds_to_move(H200, needs, "cold") * starved(grid)
    products = needs.flops * grid.products / (H200["gemm"][RATES[grid.kind]] * grid.reached)
    instructions = H200["fma"] / 2
    behind = needs.exponentials / H200["exp"] + PER_SCORE * needs.compares / instructions
    products, behind = products * unfilled(grid), behind * unfilled(grid)
    at_once = max(products, behind) if grid.together > 1 else products + behind
    first = selected(call, instructions)
    return launched * H200["launch_us"] / 1e6 + first + max(memory, at_once)


def waves(grid: Grid) -> float | None:
    return grid.blocks and grid.blocks / _wave(grid.blocks, grid)


def unfilled(grid: Grid) -> float:
    """How much longer it takes than if the last wave were full."""
    count = waves(grid)
    return math.ceil(count) / count if count else 1.0


def starved(grid: Grid) -> float:
    """How much longer bytes take where few multiprocessors ask for them."""
    return max(1.0, MULTIPROCESSORS / (DRAWN_ALONE * grid.blocks)) if grid.blocks else 1.0


def _wave(blocks: int, grid: Grid) -> int:
    """Blocks spread before they share a multiprocessor."""
    return MULTIPROCESSORS * min(grid.together, -(-blocks // MULTIPROCESSORS))


def selected(call: Call, instructions: float) -> float:
    """Seconds of a selection, which has a multiprocessor for each row of scores."""
    if call.op.name != "gather_topk" or call.gradient:
        return 0.0
    rows, length = call.kwargs["scores"].shape
    share = min(rows, MULTIPROCESSORS) / MULTIPROCESSORS
    return float(PER_DIGIT * rows * length / (instructions * share))


def _native(call: Call) -> Prediction:
    name = call.op.name
    narrow = any(t.element_size() == 2 for t in tensors_in(call.kwargs))
    grid = Grid(None, 2)
    if name in cuda_kernels.TENSOR_CORES:
        times = cuda_kernels.TENSOR_CORES[name][narrow]
        together = cuda_kernels.blocks_together(name, str(call.dtype).removeprefix("torch."))
        grid = Grid(None, together, "16 bits", times, REACHED[False])
    launched = cuda_kernels.CALLS[name](call.kwargs)[call.gradient]
    return _prediction(call, "native", launched, grid)


def _triton(call: Call, built: dict[str, dict[str, Any]]) -> Prediction:
    if not call.launches:
        launched = launches(call.op, call.kwargs, call.gradient)
        return _prediction(call, "triton", launched, Grid(None, 2))
    found = [(launch, built[kernels.key(job)]) for launch, job in call.launches]
    # Where nothing multiplies on tensor cores, most work is where most bytes are.
    launch, k = max(
        found, key=lambda one: (one[1]["multiplies"] != "float32", kernels.touched(one[0]))
    )
    reached = 1.0 if k["multiplies"] == "float32" else REACHED[k["groups"]]
    blocks = math.prod(launch.grid)
    grid = Grid(blocks, kernels.together(k), k["multiplies"], k["products"], reached)
    return _prediction(call, "triton", len(found) + call.copies, grid)


def _prediction(call: Call, backend: str, launched: int, grid: Grid) -> Prediction:
    needs = work(call)
    least, bound = limit(H200, needs)
    dtype, passed = needs.dtype, waves(grid)
    return Prediction(
        call.op.name, call.case.id, dtype, call.gradient, backend, launched,
        needs.moved, needs.flops, needs.exponentials, needs.compares, grid.blocks,
        passed and round(passed, 3), bound, _microseconds(least),
        _microseconds(seconds(call, needs, launched, grid)),
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
