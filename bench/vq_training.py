"""One step of a quantiser that learns: search, look-up, straight-through, loss, EMA; ours and the
module that most are built from. `python -m bench.vq_training` prints a table.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import tokenkernels as tk
from bench.settings import keep_freed_memory
from bench.timing import alternate

SHAPES = ((4096, 1024, 256), (8192, 4096, 12), (6000, 1024, 128), (2048, 16384, 256))
DECAY, EPS = 0.8, 1e-5


class Lean(torch.nn.Module):
    """The Euclidean EMA quantiser, of the functions of this package."""

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


def quantisers(codes: int, dim: int) -> dict[str, torch.nn.Module]:
    """Ours, and theirs with straight-through and with the rotation trick, of one codebook."""
    from vector_quantize_pytorch import VectorQuantize

    embed = torch.randn(codes, dim, generator=torch.Generator().manual_seed(1))
    found: dict[str, torch.nn.Module] = {"tokenkernels": Lean(embed)}
    for name, rotation in (("straight-through", False), ("rotation trick", True)):
        module = VectorQuantize(dim, codes, rotation_trick=rotation)
        for buffer in (module._codebook.embed, module._codebook.embed_avg):
            buffer.data.copy_(embed)
        module._codebook.cluster_size.data.fill_(1)
        found[f"vector-quantize-pytorch, {name}"] = module
    return found


def step(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward; returns the indices and the gradient to the tokens."""
    x = x.detach().requires_grad_()
    quantized, index, loss = module(x[None])
    (quantized.sum() + loss.sum()).backward()
    return index, x.grad


def check(modules: dict[str, torch.nn.Module], x: Tensor) -> None:
    """All of them choose the same codes and learn the same codebook from one step."""
    ours, theirs = list(modules.values())[:2]
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
    check(quantisers(codes, dim), x)
    modules = {name: module.train(training) for name, module in quantisers(codes, dim).items()}
    calls: dict[str, Any] = {}
    for name, module in modules.items():
        calls[name] = (lambda m=module: step(m, x)) if training else (lambda m=module: m(x[None]))
    with torch.set_grad_enabled(training):
        samples = alternate(calls, seconds)
    return {name: 1e3 * statistics.median(taken) for name, taken in samples.items()}


def main() -> None:
    keep_freed_memory()
    for training in (True, False):
        for shape in SHAPES:
            ms = measure(*shape, training, seconds=4.0)
            ours = ms.pop("tokenkernels")
            others = "  ".join(f"{name} {t:.1f} ms = {t / ours:.1f}×" for name, t in ms.items())
            print("training" if training else "eval", *shape, f"ours {ours:.2f} ms ", others)


if __name__ == "__main__":
    main()
