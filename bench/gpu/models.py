"""SiT on a GPU: dense and slimmed, official formulation and ours, by CUDA-graph replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tokenmodels.sit import VARIANTS

from bench import bench_models
from bench.gpu import timing

BATCHES = (1, 8, 32, 128, 512)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of the largest logit; in bfloat16 both round after every layer."""


def cells(dry: bool) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """(name, what measures it) for every variant × batch size, in bfloat16."""
    for batch in BATCHES[:1] if dry else BATCHES:
        for name in bench_models.NAMES[: 1 if dry else None]:
            yield f"{name} batch {batch}", partial(_measure, name, batch)


def _measure(name: str, batch: int) -> list[dict[str, Any]]:
    device = "cuda" if timing.has_gpu() else "cpu"
    dtype = torch.bfloat16 if timing.has_gpu() else torch.float32
    forms = bench_models.forms_of(VARIANTS[name], device, dtype)
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    images = images.to(device, dtype)
    with torch.inference_mode():
        calls = {key: partial(form, images) for key, (_, form) in forms.items()}
        for slim in (False, True):
            want, got = calls["official", slim](), calls["ours", slim]()
            error = ((got - want).abs().max() / want.abs().max()).item()
            assert error <= TOLERANCE[dtype], f"{name}: logits are off by {error:.2g}"
        took = timing.in_turns({key: [call] for key, call in calls.items()}, 3.0)
    times = {key: found.ms / 1e3 for key, found in took.items()}
    return list(bench_models.records(name, forms, times, batch))
