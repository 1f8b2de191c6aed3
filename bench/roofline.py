"""The roofs of a machine, and the least time that they leave a call: one vocabulary and one limit
for what is measured on a CPU (here), on a GPU (`bench.gpu.roofs`) or assumed (`bench.predict`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.timing import alternate
from bench.work import Work

Roof = dict[str, Any]
"""Bytes/s by total bytes moved for "copy" and "read", under "cold" (the input was not touched for
longer than the caches remember) and "warm" (the same input again). Flop/s of products, "gemm", by
dtype ("tf32" where a GPU has it); of multiply-adds outside of products, "fma"; exponentials/s,
"exp". Microseconds that one launch takes among others, "launch_us", and by itself,
"eager_launch_us": on a CPU a call of torch. Whatever is missing limits nothing.
"""

MIB = 2**20
PRODUCT = 1024
SIZES = (1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)
FORGOTTEN = 512 * MIB
"""Bytes that no cache of a CPU holds: inputs that are cold rotate among so many."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""float16 counts as float32, which it is widened to: torch multiplies it element by element on most
processors.
"""


class Limit(NamedTuple):
    """The least seconds of a call, and what takes them."""

    seconds: float
    bound: str


def limit(roof: Roof, work: Work, *, cache: str = "cold", memory: float | None = None) -> Limit:
    """The longest of moving, multiplying, exponentiating, comparing and launching, as if all went
    on at once. `memory` are seconds that moving took beside the call itself, where it was measured
    there.
    """
    parts = {
        "memory": seconds_to_move(roof, work, cache) if memory is None else memory,
        "arithmetic": work.flops / rate(roof, work.dtype),
        "exponentials": work.exponentials / roof.get("exp", math.inf),
        "compares": work.compares / (roof.get("fma", math.inf) / 2),
        "launches": work.launches * roof.get("launch_us", 0.0) / 1e6,
    }
    bound = max(parts, key=lambda part: parts[part])
    return Limit(parts[bound], bound)


def seconds_to_move(roof: Roof, work: Work, cache: str) -> float:
    """Every written byte goes with one that is read, which is a copy; what is read beyond that is
    only read. Each at the rate of the nearest size that was measured.
    """
    copied, seconds = copied_of(work.moved, work.written), 0.0
    for kind, moved in (("copy", copied), ("read", work.moved - copied)):
        rates = roof[cache][kind]
        if moved > 0:
            size = min(rates, key=lambda size: abs(math.log(float(size) / moved)))
            seconds += moved / rates[size]
    return seconds


def rate(roof: Roof, dtype: str) -> float:
    """Flop/s of the fastest way to multiply in a dtype. In float32 that is a product, multiply-adds
    or, on a GPU, three products of 16-bit parts.
    """
    products = roof["gemm"]
    halves = products["bfloat16"] / 3 if "tf32" in products else 0.0
    wide = max(products["float32"], roof.get("fma", 0.0), halves)
    return float(wide if dtype == "float32" else products.get(dtype, wide))


def copied_of(moved: float, written: float) -> float:
    return min(moved, 2 * min(written, moved))


def measure(seconds: float = 20.0) -> Roof:
    """The roofs of this CPU.

    Timed as the ops are (same alternation, outputs allocated inside), by the best of what is
    installed. A bandwidth is the median; a rate of arithmetic the best over some sizes, since
    nothing is gained from a roof that is too low. No compiled loop tells the rate of multiply-adds:
    it counts as that of the fastest product, of all threads or of one times their number.
    """
    per_size = 0.3 * seconds / len(SIZES)
    pool = torch.ones(max(FORGOTTEN, *SIZES) // 4)
    warm = [_bandwidth(pool[: size // 4], size, per_size, cold=False) for size in SIZES]
    cold = [
        _bandwidth(pool[: FORGOTTEN // 4], size, per_size, cold=True) if size < FORGOTTEN else known
        for size, known in zip(SIZES, warm, strict=True)
    ]
    del pool
    threads = torch.get_num_threads()
    many = _rates(0.25 * seconds)
    torch.set_num_threads(1)
    try:
        one = _rates(0.1 * seconds, torch_only=True)
    finally:
        torch.set_num_threads(threads)
    return {
        "cold": _by_size(cold),
        "warm": _by_size(warm),
        "gemm": many,
        "gemm_one_thread": one,
        "fma": max(many["float32"], threads * one["float32"]),
        "launch_us": 1e6 * _call(0.05 * seconds),
        "threads": threads,
    }


def memory_calls(moved: float, written: float) -> dict[str, Callable[[], Any]]:
    """What memory alone needs for a call that moves `moved` bytes, of which it writes `written`:
    timed in turns with that call, and so as warm as it.
    """
    copied = copied_of(moved, written)
    calls: dict[str, Callable[[], Any]] = {}
    if copied >= 8:
        calls["roof: copy"] = torch.ones(int(copied) // 8).clone
    if moved - copied >= 4:
        calls["roof: read"] = torch.ones(int(moved - copied) // 4).sum
    return calls


def product_calls(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Products of square matrices, timed in turns with a call that does arithmetic."""
    a, b = (torch.randn(PRODUCT, PRODUCT).to(dtype) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {"roof: product": partial(torch.mm, a, b)}
    if dtype == torch.float32:
        calls["roof: product of arrays"] = partial(np.matmul, a.numpy(), b.numpy())
    return calls


def raised(roof: Roof, dtype: str, seconds: float) -> Roof:
    """With the rate of a product that took `seconds` between the calls that are judged by it, where
    that is the better one.
    """
    best = max(rate(roof, dtype), 2.0 * PRODUCT**3 / seconds)
    return roof | {"gemm": roof["gemm"] | {dtype: best}}


def _by_size(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        kind: {str(size): rates[kind] for size, rates in zip(SIZES, found, strict=True)}
        for kind in ("copy", "read")
    }


def _bandwidth(pool: torch.Tensor, size: int, seconds: float, *, cold: bool) -> dict[str, float]:
    """Of inputs that rotate through the whole pool where they are to be cold, else of its first."""

    def turning(function: Callable[..., Any], width: int) -> Callable[[], Any]:
        count = pool.nbytes // width if cold else 1
        parts = pool[: count * width // 4].view(count, -1)
        calls = itertools.cycle([partial(function, part) for part in parts])
        return lambda: next(calls)()

    side = math.isqrt(size // 4)
    vector = torch.ones(side)
    calls: dict[str, Callable[[], Any]] = {
        "copy": turning(torch.clone, size // 2),
        "sum": turning(torch.sum, size),
        "product": turning(lambda part: torch.mv(part[: side**2].view(side, side), vector), size),
    }
    took = {name: statistics.median(t) for name, t in alternate(calls, seconds).items()}
    return {"copy": size / took["copy"], "read": size / min(took["sum"], took["product"])}


def _rates(seconds: float, torch_only: bool = False) -> dict[str, float]:
    sizes = (256, 768, 1536, 2048)
    rates = {}
    for name, dtype in DTYPES.items():
        calls: dict[str, Callable[[], Any]] = {}
        for size in sizes:
            a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
            calls[f"torch {size}"] = partial(torch.mm, a, b)
            if dtype == torch.float32 and not torch_only:
                calls[f"numpy {size}"] = partial(np.matmul, a.numpy(), b.numpy())
        flops = {call: 2.0 * int(call.split()[1]) ** 3 for call in calls}
        took = alternate(calls, seconds / len(DTYPES), rounds=(3, 40))
        rates[name] = max(flops[call] / min(samples) for call, samples in took.items())
    return rates


def _call(seconds: float) -> float:
    """What it takes to call an op of torch that has nothing to do."""
    with torch.inference_mode():
        return statistics.median(alternate({"": torch.zeros(1).clone}, seconds)[""])
