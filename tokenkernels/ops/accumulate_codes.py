"""accumulate_codes: how many tokens chose each code, and their sum: what an EMA codebook learns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._op import Op, autocast
from ..cases import accumulate_codes as cases
from ..checks.accumulate_codes import accumulate_codes as _check


class Accumulated(NamedTuple):
    """What accumulate_codes returns."""

    counts: Tensor
    sums: Tensor


def accumulate_codes(
    x: Tensor, index: Tensor, K: int, *, grouped: bool = False, backend: str | None = None
) -> Accumulated:
    """Counts and adds up the tokens of every code, without a one-hot matrix.

    Tokens are added in ascending order, in float32, whatever the number of threads: the same bits
    every time. No gradient.

    Args:
        x: (…, D), or (…, G, D) with `grouped`; at most 9 dimensions; float32, float16 or bfloat16.
        index: int64, the shape of x without D: 0…K−1, or −1 for a token that counts nowhere.
        K: The number of codes.
        grouped: The last dimension but one of x counts codebooks, which are added up separately.
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        counts: int64 (K,), or (G, K).
        sums: float32 (K, D), or (G, K, D).

    Raises:
        ValueError: shapes that do not fit; on the CPU, an index outside −1…K−1.
        TypeError: dtypes outside the list.

    Source: VQ-VAE (van den Oord et al. 2017), appendix A.1: n and Σ z of equations 6 and 7.

    Example:
        >>> import torch, tokenkernels as tk
        >>> tk.accumulate_codes(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 0, 1]), 3)
        Accumulated(counts=tensor([1, 2, 0]), sums=tensor([[2.],
                [5.],
                [0.]]))
    """
    (x,) = autocast(x)
    _check(x, index, K, grouped, backend)
    if x.requires_grad:
        x = x.detach()
    return Accumulated(*OP(backend, x.device.type, x, index, K, grouped))


def _reference(x: Tensor, index: Tensor, codes: int, grouped: bool) -> tuple[Tensor, Tensor]:
    if ((index < -1) | (index >= codes)).any():
        raise ValueError(
            "accumulate_codes: index: allowed -1 … K−1 (-1: counted nowhere), "
            f"got {index.min().item()} … {index.max().item()}"
        )
    groups = x.shape[-2] if grouped else 1
    rows = x.reshape(x.shape[:-1].numel() // groups, groups, x.shape[-1])
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    index = index.reshape(rows.shape[:2])
    counts = index.new_zeros(groups, codes)
    sums = rows.new_zeros(groups, codes, rows.shape[2])
    for g in range(groups):
        counted = index[:, g] >= 0
        chosen = index[counted, g]
        counts[g] = torch.bincount(chosen, minlength=codes)
        sums[g].index_add_(0, chosen, rows[counted, g])
    return (counts, sums) if grouped else (counts[0], sums[0])


def _fake(x: Tensor, index: Tensor, codes: int, grouped: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[-2], codes) if grouped else (codes,)
    wide = torch.promote_types(x.dtype, torch.float32)
    return index.new_empty(shape), x.new_empty((*shape, x.shape[-1]), dtype=wide)


OP = Op(
    schema="accumulate_codes(Tensor x, Tensor index, SymInt codes, bool grouped) "
    "-> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=accumulate_codes,
    cases=cases.CASES,
    bad=cases.BAD,
    bad_values=cases.BAD_VALUES,
    cost=cases.cost,
    length=lambda kwargs: kwargs["index"].numel(),
    launches=lambda kwargs: (4, 0),
)
