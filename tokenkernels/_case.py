"""Inputs of an op, made from a name: the same numbers in every run, on every machine."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Bad = tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]
"""What to change in the arguments of an op's first case, the exception that follows, its words."""


@dataclass(frozen=True)
class BadValues:
    """Integers that are refused with a ValueError, but for where looking at them would wait for a
    GPU: there nothing is accessed out of bounds, and each wrong entry is passed over.
    """

    change: Callable[[dict[str, Any]], dict[str, Any]]
    words: str
    instead: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """What changes a call into a good one that gives what the GPU then gives; without it, at least
    the images whose arguments are as they were give what they gave.
    """


class Make:
    """Draws tensors for one case; floating values are rounded to the dtype under test."""

    def __init__(self, seed: str, dtype: torch.dtype, device: str = "cpu") -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator)
        return values.to(dtype or self.dtype).to(self.device)

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.rand(shape, generator=self._generator)
        return values.to(dtype or self.dtype).to(self.device)

    def randint(self, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(self.device)

    def permutation(self, size: int) -> torch.Tensor:
        return torch.randperm(size, generator=self._generator).to(self.device)

    def bool(self, probability: float, shape: tuple[int, ...]) -> torch.Tensor:
        return (torch.rand(shape, generator=self._generator) < probability).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of an op: `make` draws the keyword arguments, `tags` say who uses it ("test",
    "bench"), and what the tests must know of it ("long": too much for an interpreter).
    """

    id: str
    make: Callable[[Make], dict[str, Any]]
    tags: tuple[str, ...] = ("test",)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    def kwargs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        return self.make(Make(self.id, dtype, device))


def close(
    got: list[torch.Tensor], want: list[torch.Tensor], low: list[torch.Tensor], length: float
) -> None:
    """Integers are equal; floats are as close as their dtype and a sum of `length` terms allow.

    `want` was computed in float64, `low` by the reference in the dtype of `got`. A float32 sum of n
    terms of random sign is off by about eps·√n of the largest result; twice that, and 8 eps for the
    functions around it, is the bound. In half precision the error may be twice the reference's own,
    or one rounding.
    """
    assert len(got) == len(want) == len(low), f"{len(got)} outputs instead of {len(want)}"
    for number, (g, w, r) in enumerate(zip(got, want, low, strict=True)):
        assert g.shape == w.shape, (
            f"output {number}: shape {tuple(g.shape)} instead of {tuple(w.shape)}"
        )
        assert g.dtype == r.dtype, f"output {number}: dtype {g.dtype} instead of {r.dtype}"
        if g.dtype == w.dtype and torch.equal(g, w):
            continue
        assert g.dtype.is_floating_point, (
            f"output {number}: integers differ at {(g != w).nonzero()[:4].tolist()}"
        )
        if g.numel() == 0:
            continue
        g, w, r = g.double(), w.double(), r.double()
        finite = w.isfinite()
        if not finite.all():
            assert torch.equal(g.isnan(), w.isnan()), f"output {number}: NaN in other places"
            infinite = ~finite & ~w.isnan()
            assert torch.equal(g[infinite], w[infinite]), f"output {number}: infinities differ"
            if not finite.any():
                continue
            g, w, r = g[finite], w[finite], r[finite]
        error, scale = (g - w).abs().max().item(), w.abs().max().item()
        eps = torch.finfo(got[number].dtype).eps
        if got[number].dtype == torch.float32:
            bound = eps * (8 + 2 * length**0.5) * scale
        else:
            bound = max(2 * (r - w).abs().max().item(), eps * scale)
        assert error <= bound, (
            f"output {number}: error {error:.3g}, bound {bound:.3g}, scale {scale:.3g}"
        )


def no_worse(got: list[torch.Tensor], want: list[torch.Tensor], low: list[torch.Tensor]) -> None:
    """In the Euclidean norm nothing is further from `want` than `low` is."""
    for number, (g, w, r) in enumerate(zip(got, want, low, strict=True)):
        finite = w.isfinite()
        assert torch.equal(g.isfinite(), finite), f"output {number}: not finite in other places"
        error, allowed = ((t - w)[finite].double().norm().item() for t in (g, r))
        assert error <= allowed, f"output {number}: error {error:.3g} in the norm, {allowed:.3g}"
