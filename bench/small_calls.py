"""What a call costs when there is next to nothing to do: every public function on the smallest
input that it is tested on.

`python -m bench.small_calls` prints the table that `python -m bench` shows with others.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

import tokenkernels.numpy as arrays
import tokenkernels.ops
from bench import report, settings
from tokenkernels._op import OPS, Op, recording, tensors_in

tokenkernels.ops.load()
GOALS = {"inference mode µs": 12.0, "otherwise µs": 22.0, "NumPy µs": 5.0}
ROUNDS, REPEATS = 5, 20


def run(quick: bool) -> list[dict[str, Any]]:
    """One record per function: microseconds per call in each way to call it, the goals first.

    Columns: `op alone` is the registered operator without the public function around it, in
    inference mode; `otherwise` is the function outside of it, of inputs that need no gradient.
    """
    seconds = 0.04 if quick else 0.1
    records: list[dict[str, Any]] = [{"function": "goal", "case": "", "op alone µs": ""} | GOALS]
    for op in OPS.values():
        if op.function is not None and op.why_not("native", "cpu") is None:
            records.append(_record(op, seconds))
    return records


def _record(op: Op, seconds: float) -> dict[str, Any]:
    case_id, kwargs = _smallest(op)
    assert op.function is not None
    function = partial(op.function, **kwargs, backend="native")
    of_arrays = partial(getattr(arrays, op.function.__name__), **tree_map(_array, kwargs))
    with recording() as calls:
        function()
    overload, arguments = next(call[1:] for call in calls if call[0] is op)
    with torch.inference_mode():
        alone, inference = (
            overhead(partial(overload, *arguments), seconds),
            overhead(function, seconds),
        )
    return {
        "function": op.name,
        "case": case_id,
        "op alone µs": alone,
        "inference mode µs": inference,
        "otherwise µs": overhead(function, seconds),
        "NumPy µs": overhead(of_arrays, seconds),
    }


def overhead(call: Callable[[], Any], seconds: float) -> float:
    """Microseconds per call: the least of some medians, each over its share of `seconds`."""
    call()
    lowest = math.inf
    for _ in range(ROUNDS):
        end, taken = time.perf_counter() + seconds / ROUNDS, []
        while time.perf_counter() < end:
            start = time.perf_counter()
            for _ in range(REPEATS):
                call()
            taken.append((time.perf_counter() - start) / REPEATS)
        lowest = min(lowest, statistics.median(taken))
    return 1e6 * lowest


def _smallest(op: Op) -> tuple[str, dict[str, Any]]:
    """The test case of the fewest bytes that leaves no argument empty."""
    tried = [(case.id, case.kwargs(torch.float32)) for case in op.cases if "test" in case.tags]
    full = [(name, kwargs) for name, kwargs in tried if all(t.numel() for t in _inputs(kwargs))]
    return min(full, key=lambda one: sum(t.nbytes for t in _inputs(one[1])))


def _inputs(kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return tensors_in(list(kwargs.values()))


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def main() -> None:
    settings.restart()
    from bench import tables

    report.console().print(report.drawn(tables.of_records("Small calls", run(False))))


if __name__ == "__main__":
    main()
