"""Times calls on a GPU: one replay of a CUDA graph over rotated inputs larger than the L2 cache.

Without a GPU the same calls run one after another, so that everything around them can be tried.
"""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from bench.timing import alternate
from tokenkernels._op import tensors_in

Call = Callable[[], Any]
SAMPLE = 2e-3
"""Seconds that one sample should last: what starting a replay and waiting for it costs is then lost
in it.
"""
CALLS = 50
"""Calls of one graph, unless they take long or more inputs rotate: what lies between two replays is
lost among them.
"""
LONG = 0.05
MOST_COPIES = 128
FATAL = r"CUDA (driver )?error|Triton Error \[CUDA\]|CUDNN_STATUS|CUBLAS_STATUS|device-side assert"


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


def is_fatal(problem: str) -> bool:
    """Whether words are those of an error after which CUDA does nothing more in this process."""
    return re.search(FATAL, problem) is not None


def in_turns(
    contenders: Mapping[Any, Sequence[Call]], seconds: float, failed: dict[Any, str] | None = None
) -> dict[Any, Timed]:
    """Every contender's calls (one per copy of the input), replayed in random order. Where `failed`
    is given, one that does not get that far is left out and told there.
    """
    ready = {}
    for name, calls in contenders.items():
        try:
            ready[name] = _ready(calls)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    samples = alternate({name: r.sample for name, r in ready.items()}, seconds, rounds=(7, 40))
    found = {}
    for name, r in ready.items():
        values = [1e3 * s / r.count for s in samples[name]]
        call = contenders[name][0]
        found[name] = Timed(
            statistics.median(values), values, r.how, r.eager_ms, launches(call), extra_memory(call)
        )
    return found


@dataclass
class _Ready:
    """One function that makes `count` calls and waits for them."""

    sample: Call
    count: int
    how: str
    eager_ms: float


def _ready(calls: Sequence[Call]) -> _Ready:
    calls[0]()
    synchronize()

    def once() -> None:
        calls[0]()
        synchronize()

    one = min(alternate({"": once}, 0.01)[""])
    if not has_gpu():
        return _Ready(calls[0], 1, "no GPU", 1e3 * one)
    calls = calls[: int(LONG / one) + 1]
    for call in calls:
        call()
    rounds = max(1, min(CALLS, int(LONG / one)) // len(calls))
    count = rounds * len(calls)

    def all_calls() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    if reason := why_no_graph(calls[0]):

        def one_by_one() -> None:
            all_calls()
            torch.cuda.synchronize()

        return _Ready(one_by_one, count, f"call by call ({reason})", 1e3 * one)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_calls()

    def replay(times: int = 1) -> None:
        for _ in range(times):
            graph.replay()
        torch.cuda.synchronize()

    replays = max(1, round(SAMPLE / min(alternate({"": replay}, 0.01)[""])))
    return _Ready(lambda: replay(replays), count * replays, "graph", 1e3 * one)


def why_no_graph(call: Call) -> str:
    """What a graph cannot hold: a call that waits for the GPU. Found without a capture, since one
    that fails leaves the allocator and the generators in the middle of it.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if is_fatal(str(error)):
            raise
        return f"{error}".split("\n")[0][:120]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def launches(call: Call) -> int | None:
    """Kernels, copies and memsets of one call; None where they cannot be counted."""
    names = launched(call)
    return len(names) if names else None


def launched(call: Call) -> list[str]:
    """What one call has a GPU do, in order; nothing where it does not let itself be profiled."""
    if not has_gpu():
        return []
    from torch.profiler import ProfilerActivity, profile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                call()
                torch.cuda.synchronize()
            events = [e for e in seen.events() or [] if e.device_type.name == "CUDA"]
    except Exception as error:  # a figure less; only what ends CUDA here is of concern
        if is_fatal(str(error)):
            raise
        return []
    events = [e for e in events if not re.match("Activity Buffer|Lazy|Runtime", e.name)]
    return [e.name for e in sorted(events, key=lambda e: e.time_range.start)]


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
