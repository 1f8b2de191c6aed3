"""One step of a quantiser that learns: search, look-up, straight-through, loss, EMA; ours and the
module that most are built from.

`python -m bench.vq_training [--quick]` prints the table that `python -m bench` shows with others.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import tokenkernels as tk
from bench import report, settings, timing

SHAPES = ((4096, 1024, 256), (8192, 4096, 12), (6000, 1024, 128), (2048, 16384, 256))
DECAY, EPS = 0.8, 1e-5


class Lean(torch.nn.Module):
    """The Euclidean EMA quantiser, of the functions of this package."""

    embed: Tensor
    average: Tensor
    size: Tensor

    def __init__(self, embed: Tensor) -> None:
        super().__init__()
        self.register_buffer("embed", embed.clone())
        self.register_buffer("average", embed.clone())
        self.register_buffer("size", torch.ones(len(embed)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = tk.assign_nearest(x, self.embed, return_codes=True)
        if not self.training:
            return found.codes, found.index, x.new_zeros(())
        counts, sums = tk.accumulate_codes(x, found.index, len(self.embed))
        self.size.lerp_(counts.float(), 1 - DECAY)
        self.average.lerp_(sums, 1 - DECAY)
        total = self.size.sum()
        smoothed = (self.size + EPS) / (total + len(self.size) * EPS) * total
        torch.div(self.average, smoothed[:, None], out=self.embed)
        return x + (found.codes - x).detach(), found.index, F.mse_loss(found.codes, x)


def quantisers(codes: int, dim: int) -> dict[str, Any]:
    """Ours, and theirs with straight-through and with the rotation trick, of one codebook."""
    from vector_quantize_pytorch import VectorQuantize

    embed = torch.randn(codes, dim, generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"ours": Lean(embed)}
    for name, rotation in (("straight-through", False), ("rotation trick", True)):
        module = VectorQuantize(dim, codes, rotation_trick=rotation)
        for buffer in (module._codebook.embed, module._codebook.embed_avg):
            buffer.data.copy_(embed)
        module._codebook.cluster_size.data.fill_(1)
        found[name] = module
    return found


def step(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward; returns the indices and the gradient to the tokens."""
    x = x.detach().requires_grad_()
    quantized, index, loss = module(x[None])
    (gradient,) = torch.autograd.grad(quantized.sum() + loss.sum(), x)
    return index, gradient


def check(ours: Lean, theirs: Any, x: Tensor) -> None:
    """Both choose the same codes and learn the same codebook from one step."""
    (index, gradient), (other, other_gradient) = step(ours, x), step(theirs, x)
    same = (index == other).all(0)
    assert same.double().mean() > 0.995, "other codes"
    assert torch.allclose(gradient[same], other_gradient[same], atol=1e-5)
    learnt = theirs._codebook.embed[0]
    close = torch.isclose(ours.embed, learnt, rtol=1e-3, atol=1e-5).all(-1)
    assert close.double().mean() > 0.98, "another codebook"


def measure(rows: int, codes: int, dim: int, training: bool, seconds: float) -> dict[str, float]:
    """Milliseconds per step (training) or per forward pass (not), by quantiser."""
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(2))
    modules = quantisers(codes, dim)
    if training:
        check(modules["ours"], modules["straight-through"], x)
    calls: dict[str, Callable[[], Any]] = {}
    for name, module in modules.items():
        module.train(training)
        calls[name] = partial(step, module, x) if training else partial(module, x[None])
    with torch.set_grad_enabled(training):
        samples = timing.alternate(calls, seconds)
    return {name: 1e3 * statistics.median(taken) for name, taken in samples.items()}


def goal(training: bool, dim: int) -> float:
    """How many times faster than the faster one of theirs a step has to be."""
    if not training:
        return 2.5
    return 5.0 if dim <= 128 else 4.0


def run(quick: bool) -> list[dict[str, Any]]:
    """One record per shape, learning and not."""
    settings.keep_freed_memory()
    records = []
    todo = [(shape, training) for shape in SHAPES for training in (True, False)]
    console = report.console()
    with report.progress(console) as bar:
        task = bar.add_task("vector quantisers", total=len(todo[: 2 if quick else None]))
        for shape, training in todo[: 2 if quick else None]:
            ms = measure(*shape, training, seconds=1.0 if quick else 2.0)
            records.append(
                {
                    "tokens x codes x dim": "x".join(map(str, shape)),
                    "step": "training" if training else "eval",
                    "ours ms": ms["ours"],
                    "vector-quantize-pytorch ms": ms["straight-through"],
                    "with its rotation trick ms": ms["rotation trick"],
                    "×": min(ms["straight-through"], ms["rotation trick"]) / ms["ours"],
                    "goal ×": goal(training, shape[2]),
                }
            )
            bar.advance(task)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    options = parser.parse_args()
    settings.restart()
    from bench import tables

    report.console().print(report.drawn(tables.of_records("Quantisers", run(options.quick))))


if __name__ == "__main__":
    main()
