"""merge_runs: alike neighbours in a sequence become one token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from .._op import Op, autocast
from ..cases import merge_runs as cases
from ..checks.merge_runs import merge_runs as _check
from ._merge import average, gradient, remember


class Merged(NamedTuple):
    """What merge_runs returns."""

    tokens: Tensor
    size: Tensor
    index: Tensor  # type: ignore[assignment]
    offsets: Tensor


def merge_runs(
    x: Tensor,
    threshold: float,
    *,
    max_run: int = 8,
    size: Tensor | None = None,
    prefix: int = 0,
    padded: bool = False,
    backend: str | None = None,
) -> Merged:
    """Merges every run of alike neighbours into its size-weighted mean, in the original order.

    Token t joins the run of token t−1 where their cosine (norms at least 1e-8) reaches `threshold`
    and the run holds fewer than `max_run` tokens. A NaN token is like nobody. Gradient to x. At
    most one host synchronisation (the number of runs); none if padded.

    Args:
        x: (B, P+N, C), float32, float16 or bfloat16. A last dimension that is not contiguous costs
            a copy.
        threshold: Least cosine of neighbours that merge, −1 … 1.
        max_run: Most tokens of a run, at least 1.
        size: (B, P+N) float32, how many tokens each one stands for; 1 if not given. Where the
            sizes that merge are all 0, the mean is NaN.
        prefix: P, leading tokens (class token, registers) that pass through; the token behind them
            begins a run.
        padded: Outputs of the input's length, zeros behind the last run of every image, so that
            nothing waits for the count.
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        tokens: packed (total, C), image after image; padded (B, P+N, C).
        size: float32 (total,) or (B, P+N), the summed sizes.
        index: int64 (B, P+N), the output row of every token, so that un-merging is one gather;
            padded: the row within its image.
        offsets: int64 (B+1), how many rows the images before have: the first row of every image
            where packed.

    Raises:
        ValueError: shapes that do not fit, max_run below 1.
        TypeError: dtypes outside the list.

    Source: A-ToMe (Li et al. 2023), §3 (adjacent cosine, threshold); H-Net (Hwang et al. 2025), eq.
    4–6 (chunks by cosine of neighbours).

    Example:
        >>> import torch, tokenkernels as tk
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
        >>> tk.merge_runs(x, 0.9).index
        tensor([[0, 0, 1]])
    """
    (x,) = autocast(x)
    _check(x, threshold, max_run, size, prefix, padded, backend)
    return Merged(*OP(backend, x.device.type, x, threshold, max_run, size, prefix, padded))


def _reference(
    x: Tensor, threshold: float, max_run: int, size: Tensor | None, prefix: int, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    alike = torch.zeros((batch, length), dtype=torch.bool, device=x.device)
    unit = wide / wide.norm(dim=2, keepdim=True).clamp_min(1e-8)
    alike[:, 1:] = (unit[:, 1:] * unit[:, :-1]).sum(2) >= threshold
    alike[:, : prefix + 1] = False
    position = torch.arange(length, device=x.device).expand(batch, length)
    start = torch.where(alike, 0, position).cummax(1).values if length else position
    begins = (position - start) % max_run == 0
    row = begins.cumsum(1) - 1
    runs = begins.sum(1)
    offsets = torch.cat([runs.new_zeros(1), runs.cumsum(0)])
    first = position.new_tensor(range(batch)) * length if padded else offsets[:-1]
    rows = batch * length if padded else int(offsets[-1])
    tokens, total = average(x, size, row + first[:, None], rows)
    if padded:
        return tokens.reshape(batch, length, channels), total.reshape(batch, length), row, offsets
    return tokens, total, row + first[:, None], offsets


def _fake(
    x: Tensor, threshold: float, max_run: int, size: Tensor | None, prefix: int, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    rows = (batch, length) if padded else (library.get_ctx().new_dynamic_size(),)
    index = x.new_empty((batch, length), dtype=torch.int64)
    offsets = x.new_empty(batch + 1, dtype=torch.int64)
    return x.new_empty((*rows, channels)), x.new_empty(rows, dtype=torch.float32), index, offsets


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    remember(ctx, inputs[3], output)


def _backward(run: Any, ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return gradient(run, ctx, grad), *[None] * 5


def _cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    x = kwargs["x"]
    rows = (
        x.shape[0] * x.shape[1]
        if kwargs.get("padded")
        else merge_runs(**kwargs, backend="reference").tokens.shape[0]
    )
    moved = (x.numel() + rows * x.shape[2]) * x.element_size()
    return moved + x.shape[0] * x.shape[1] * 8, 6 * x.numel()


OP = Op(
    schema="merge_runs(Tensor x, float threshold, SymInt max_run, Tensor? size, "
    "SymInt prefix, bool padded) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=merge_runs,
    cases=cases.CASES,
    bad=cases.BAD,
    cost=_cost,
    length=lambda kwargs: kwargs.get("max_run", 8),
    differentiable=("x",),
    backward=_backward,
    setup_context=_setup_context,
    batch=("x", "size"),
    launches=lambda kwargs: (2, 1),
    waits=lambda kwargs: int(not kwargs.get("padded")),
)
