"""Times calls on a GPU: one replay of a CUDA graph over rotated inputs larger than the L2 cache.

Without a GPU the same calls run one after another, so that everything around them can be tried.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from bench.timing import alternate
from tokenkernels._op import tensors_in

Call = Callable[[], Any]
REPLAY = 2e-3
"""Seconds that one replay should last: what starting it costs is then lost in it."""
MOST_CALLS = 400
MOST_COPIES = 128


@dataclass
class Timed:
    """What one contender took."""

    ms: float
    samples_ms: list[float]
    how: str
    """Replay of a graph, or call by call and why."""
    eager_ms: float
    launches: int | None
    extra_bytes: int


def has_gpu() -> bool:
    return torch.cuda.is_available()


def synchronize() -> None:
    if has_gpu():
        torch.cuda.synchronize()


def cache_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size if has_gpu() else 2**20


def rotated(kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Copies of the arguments, together twice the L2 cache."""
    size = sum(t.nbytes for t in tensors_in(kwargs)) or 1
    count = max(1, min(MOST_COPIES, -(-2 * cache_bytes() // size)))

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) else value

    return [kwargs, *(tree_map(copy, kwargs) for _ in range(count - 1))]


def in_turns(contenders: Mapping[Any, Sequence[Call]], seconds: float) -> dict[Any, Timed]:
    """Every contender's calls (one per copy of the input), replayed in random order."""
    ready = {name: _ready(calls) for name, calls in contenders.items()}
    samples = alternate({name: r[0] for name, r in ready.items()}, seconds, rounds=(7, 40))
    found = {}
    for name, (_, count, how, eager) in ready.items():
        values = [1e3 * s / count for s in samples[name]]
        found[name] = Timed(
            statistics.median(values), values, how, eager,
            launches(contenders[name][0]), extra_memory(contenders[name][0]),
        )  # fmt: skip
    return found


def _ready(calls: Sequence[Call]) -> tuple[Call, int, str, float]:
    """One function that makes `count` calls and waits for them; how; milliseconds of one call by
    itself.
    """
    for call in [*calls[:2], *calls[:2]]:
        call()
    synchronize()

    def once() -> None:
        calls[0]()
        synchronize()

    one = min(alternate({"": once}, 0.01)[""])
    count = max(len(calls), min(MOST_CALLS, int(REPLAY / one) + 1))
    if not has_gpu():
        return calls[0], 1, "no GPU", 1e3 * one
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(count):
                calls[i % len(calls)]()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay, count, "graph", 1e3 * one
    except Exception as error:  # a call that synchronises cannot be captured
        torch.cuda.synchronize()
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:120]

    def one_by_one() -> None:
        for i in range(count):
            calls[i % len(calls)]()
        torch.cuda.synchronize()

    return one_by_one, count, f"call by call ({reason})", 1e3 * one


def launches(call: Call) -> int | None:
    """Kernels, copies and memsets of one call."""
    if not has_gpu():
        return None
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        return sum(e.count for e in seen.key_averages() if e.device_type.name == "CUDA")
    except Exception:  # not every machine lets itself be profiled
        return None


def extra_memory(call: Call) -> int:
    """Bytes at the peak of one call beyond those before it and those it returns."""
    if not has_gpu():
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return max(0, peak - sum(t.nbytes for t in tensors_in(outputs)))
