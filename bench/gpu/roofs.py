"""The roofs of a GPU in the words of `bench.roofline`: copies and reads by size, cold and warm,
products by dtype, multiply-adds, exponentials, what a launch costs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.gpu import rates
from bench.gpu.timing import has_gpu, in_turns, rotated
from bench.roofline import MIB, Roof

SIZES = (1, 4, 16, 64, 256, 1024, 4096)


def measure(seconds: float) -> Roof:
    """Timed as the cells are; without a GPU on small inputs, so that all of it can be tried."""
    device = "cuda" if has_gpu() else "cpu"
    sizes = SIZES if has_gpu() else SIZES[:2]
    share = seconds / (len(sizes) + 5)
    bandwidths: Roof = {cache: {"copy": {}, "read": {}} for cache in ("cold", "warm")}
    for size in sizes:
        for (cache, kind), ms in _moves(size * MIB, device, share).items():
            bandwidths[cache][kind][str(size * MIB)] = size * MIB / ms * 1e3
    small = torch.zeros(1, device=device)
    launch = in_turns({"launch": [small.clone]}, share)["launch"]
    return {
        **bandwidths,
        "gemm": _products(device, share),
        **rates.measure(share),
        "launch_us": 1e3 * launch.ms,
        "eager_launch_us": 1e3 * launch.eager_ms,
    }


def _moves(size: int, device: str, seconds: float) -> dict[tuple[str, str], float]:
    """Milliseconds of moving so many bytes: (cold or warm, copy or read)."""
    source = rotated({"x": torch.ones(size // 8, device=device)})
    whole = rotated({"x": torch.ones(size // 4, device=device)})
    calls: dict[tuple[str, str], list[Any]] = {}
    for cache, most in (("cold", None), ("warm", 1)):
        calls[cache, "copy"] = [k["x"].clone for k in source[:most]]
        calls[cache, "read"] = [k["x"].sum for k in whole[:most]]
    return {key: took.ms for key, took in in_turns(calls, seconds).items()}


def _products(device: str, seconds: float) -> dict[str, float]:
    size = 8192 if has_gpu() else 256
    found = {}
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        took = in_turns({name: [partial(torch.mm, a, b)]}, seconds / 4)[name]
        found[name] = 2 * size**3 / took.ms * 1e3
    torch.backends.cuda.matmul.allow_tf32 = False
    return found
