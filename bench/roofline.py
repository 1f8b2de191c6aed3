"""Measures the roofs of this machine: how fast memory is copied and read at a given size, how fast
matrices are multiplied.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.timing import alternate

MIB = 2**20
PRODUCT = 1024
SIZES = (1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""float16 counts as float32, which it is widened to: torch multiplies it element by element on most
processors.
"""


def measure(seconds: float = 20.0) -> dict[str, Any]:
    """The roofs: bytes/s by total bytes moved for "copy" and "read", flop/s for "gemm" by dtype,
    and "gemm_one_thread".

    Timed as the ops are (same alternation, outputs allocated inside), by the best of what is
    installed. A bandwidth is the median; a rate of arithmetic the best over some sizes, since
    nothing is gained from a roof that is too low.
    """
    per_size = 0.6 * seconds / len(SIZES)
    memory = [_bandwidth(size, per_size) for size in SIZES]
    threads = torch.get_num_threads()
    many = _rates(0.3 * seconds)
    torch.set_num_threads(1)
    try:
        one = _rates(0.1 * seconds, torch_only=True)
    finally:
        torch.set_num_threads(threads)
    return {
        "copy": {str(size): m["copy"] for size, m in zip(SIZES, memory, strict=True)},
        "read": {str(size): m["read"] for size, m in zip(SIZES, memory, strict=True)},
        "gemm": many,
        "gemm_one_thread": one,
        "threads": threads,
    }


def memory_calls(moved: float, written: float) -> dict[str, Callable[[], Any]]:
    """What memory alone needs for a call that moves `moved` bytes, of which it writes `written`:
    timed in turns with that call.

    Every written byte goes with one that is read, which is a copy; what is read beyond that is only
    read.
    """
    copied = min(moved, 2 * min(written, moved))
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


def arithmetic(roof: dict[str, Any], flops: float, dtype: str, seconds: float) -> float:
    """Seconds that `flops` need at the best measured rate of their dtype: that of the roofs, or
    that of a product which took `seconds` between the calls that are judged by it.
    """
    rate = max(roof["gemm"].get(dtype, roof["gemm"]["float32"]), 2.0 * PRODUCT**3 / seconds)
    return float(flops / rate)


def _bandwidth(size: int, seconds: float) -> dict[str, float]:
    source = torch.ones(size // 2 // 4)
    whole = torch.ones(size // 4)
    square = whole[: math.isqrt(whole.numel()) ** 2].view(math.isqrt(whole.numel()), -1)
    vector = torch.ones(square.shape[1])
    calls: dict[str, Callable[[], Any]] = {
        "copy": source.clone,
        "sum": whole.sum,
        "product": partial(torch.mv, square, vector),
    }
    took = {name: statistics.median(t) for name, t in alternate(calls, seconds).items()}
    return {"copy": size / took["copy"], "read": size / min(took["sum"], took["product"])}


def _rates(seconds: float, torch_only: bool = False) -> dict[str, float]:
    sizes = (768, 1536, 2048)
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
