"""Times functions side by side, and sees how much memory a call takes beyond what it returns."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Call = Callable[[], Any]
Name = TypeVar("Name")
TURN = 2e-3
"""Seconds that one turn of a fast function lasts: shorter calls are repeated and averaged."""

SLOW = 3.0
"""Times the fastest call: what takes longer decides nothing and is sampled twice."""


def alternate(
    calls: dict[Name, Call],
    seconds: float,
    rounds: tuple[int, int] = (5, 40),
    slow: float = SLOW,
) -> dict[Name, list[float]]:
    """Seconds per call, some samples of each: in every round each function takes one turn, in
    random order.

    So slow drift of the machine meets all of them alike, and none always follows the same other. A
    turn of a call shorter than `TURN` starts with one call that is not timed, since the others have
    emptied the caches. Ends at the upper number of rounds, or after the lower one once `seconds`
    have passed; one that has had its share by then sits out the rounds behind, and so does one that
    is `slow` times slower than the fastest after two.
    """
    draw = random.Random(0)
    expected = {name: _timed(call, 1) for name, call in calls.items()}
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    share = seconds / max(len(calls), 1)
    too_slow = slow * min(expected.values(), default=0.0)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds[1]):
            if done >= rounds[0] and time.perf_counter() - start > seconds:
                break
            for name in draw.sample(list(calls), len(calls)):
                least = 2 if expected[name] > too_slow else rounds[0]
                if done >= least and sum(samples[name]) > share:
                    continue
                repeats = max(1, int(TURN / expected[name]))
                if repeats > 1:
                    calls[name]()
                samples[name].append(_timed(calls[name], repeats))
                expected[name] = min(expected[name], samples[name][-1])
    finally:
        gc.enable()
    return samples


def _timed(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


class Others:
    """How busy other processes keep the processors from here on: they disturb what is timed."""

    def __init__(self) -> None:
        self._start = self._now()

    def percent(self) -> float | None:
        """Of one processor; None where nobody counts."""
        before, now = self._start, self._now()
        if before is None or now is None or now[0] <= before[0]:
            return None
        return 100 * max(0.0, (now[1] - before[1]) / (now[0] - before[0]))

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Seconds by the clock, and those that others ran or were stolen."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, soft, stolen = map(int, stat.read_text().split()[1:9])
        busy = (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), busy - own.user - own.system


def extra_memory(call: Call, returned: Callable[[Any], int]) -> float | None:
    """Bytes that were resident at the peak of one call, beyond those before it and those it
    returns; None where nobody counts.

    The kernel counts, so whatever library allocates is seen. Freed blocks go back to the system
    first: they would be used again unnoticed. Pages are counted in batches per thread, so some
    hundred KiB are noise.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    libc = ctypes.CDLL(None)
    if not (status.exists() and reset.exists() and hasattr(libc, "malloc_trim")):
        return None
    libc.malloc_trim(0)
    try:
        reset.write_text("5")
    except OSError:
        return None
    before = _resident(status, "VmRSS")
    outputs = call()
    peak = _resident(status, "VmHWM") - before
    return float(max(0, peak - returned(outputs)))


def _resident(status: Path, key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+)", status.read_text())
    assert found, f"{status} has no {key}"
    return int(found[1]) * 1024
