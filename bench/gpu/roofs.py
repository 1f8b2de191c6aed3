"""The roofs of a GPU: copies and reads by size, matrix products by dtype, what a launch costs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from bench.gpu.timing import has_gpu, in_turns, rotated

MIB = 2**20
SIZES = (1, 4, 16, 64, 256, 1024, 4096)


def measure(seconds: float) -> dict[str, Any]:
    """Bytes/s by bytes moved, flop/s by dtype, seconds per launch in a graph and by itself."""
    device = "cuda" if has_gpu() else "cpu"
    sizes = SIZES if has_gpu() else SIZES[:2]
    share = seconds / (len(sizes) + 4)
    copy, read = {}, {}
    for size in sizes:
        source = {"x": torch.ones(size * MIB // 8, device=device)}
        whole = {"x": torch.ones(size * MIB // 4, device=device)}
        calls = {
            "copy": [k["x"].clone for k in rotated(source)],
            "read": [k["x"].sum for k in rotated(whole)],
        }
        took = in_turns(calls, share)
        copy[str(size * MIB)] = size * MIB / took["copy"].ms * 1e3
        read[str(size * MIB)] = size * MIB / took["read"].ms * 1e3
    small = torch.zeros(1, device=device)
    launch = in_turns({"launch": [small.clone]}, share)["launch"]
    return {
        "copy": copy,
        "read": read,
        "gemm": _products(device, share),
        "launch_us": 1e3 * launch.ms,
        "eager_launch_us": 1e3 * launch.eager_ms,
    }


def _products(device: str, seconds: float) -> dict[str, float]:
    size = 8192 if has_gpu() else 256
    rates = {}
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        took = in_turns({name: [partial(torch.mm, a, b)]}, seconds / 4)[name]
        rates[name] = 2 * size**3 / took.ms * 1e3
    torch.backends.cuda.matmul.allow_tf32 = False
    return rates


def seconds_at(roof: dict[str, Any], kind: str, moved: float) -> float:
    """Seconds that moving so many bytes takes at the measured rate of the nearest size."""
    rates = roof[kind]
    nearest = min(rates, key=lambda size: abs(math.log(float(size) / moved)))
    return moved / rates[nearest]
