"""SiT on a GPU: dense and slimmed, official formulation and ours; call by call, as one CUDA graph,
and as the graph of what torch.compile makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tokenmodels.sit import VARIANTS

from bench import bench_models
from bench.bench_models import FORMS
from bench.gpu import timing
from bench.photographs import photographs

BATCHES = (128, 1, 8, 32, 512)
MOST = 8e12
"""Multiply-accumulates of one call: what is larger takes too long, or too much memory."""
DTYPES = ("bfloat16", "float32", "float16")
TOLERANCE = 1e-3
"""Of the largest logit in float32, whose convolutions may round to TF32."""


def cells(dry: bool) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """(name, what measures it) for dtype × kind × batch size × variant, the most telling first."""
    if dry:
        yield (
            "sit_tiny batch 1 float32 eager",
            partial(_measure, "sit_tiny", 1, "float32", "eager"),
        )
        return
    for dtype in DTYPES:
        for kind in bench_models.KINDS:
            for batch in BATCHES:
                for name, config in VARIANTS.items():
                    if replace(config, dense=True).macs() * batch > MOST:
                        continue
                    cell = f"{name} batch {batch} {dtype} {kind}"
                    yield cell, partial(_measure, name, batch, dtype, kind)


def _measure(name: str, batch: int, dtype: str, kind: str) -> list[dict[str, Any]]:
    torch.compiler.reset()  # it compiles the same function for so many models only
    device = "cuda" if timing.has_gpu() else "cpu"
    number, size = bench_models.DTYPES[dtype], VARIANTS[name].image_size
    assert isinstance(size, int)
    forms = bench_models.forms_of(VARIANTS[name], device, number)
    exact, what = _images(batch, size)
    exact = exact.to(device)
    images = exact.to(number)
    with torch.inference_mode(), bench_models.casts_kept():
        calls: dict[tuple[str, str, bool], Callable[[], Any]] = {}
        for form in FORMS:
            for slim in (False, True):
                function = forms[form, slim][1]
                if kind == "compiled":
                    function = torch.compile(function, fullgraph=True, dynamic=False)
                function(images)
                calls[form, kind, slim] = partial(function, images)
        errors = bench_models.check(forms, calls, exact, number, TOLERANCE)
        took = timing.in_turns({key: [call] for key, call in calls.items()}, 3.0)
    rows = []
    kinds = {f"{kind}, one graph": lambda found: found.ms}
    if kind == "eager":
        kinds["eager"] = lambda found: found.eager_ms
    for shown, milliseconds in kinds.items():
        times = {(f, shown, slim): milliseconds(took[f, kind, slim]) / 1e3 for f, _, slim in took}
        for key, row in zip(times, bench_models.records(name, dtype, batch, times), strict=True):
            found = took[key[0], kind, key[2]]
            row |= {"how": found.how if shown != "eager" else "call by call"}
            row |= {"launches": found.launches, "error": f"{errors[key[0], kind, key[2]]:.1e}"}
            row |= {"extra MB": found.extra_bytes / 1e6}
            rows.append(row | {"images": what})
    return rows


def _images(batch: int, size: int) -> tuple[torch.Tensor, str]:
    """Photographs where scikit-learn is, which has some; they cost what noise costs."""
    try:
        return photographs(batch, size), "photographs"
    except ImportError:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, 3, size, size, generator=generator), "noise"
