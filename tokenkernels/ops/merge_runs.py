"""merge_runs: neighbours in a sequence that are alike become one token (the 1-D chain form of merging)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._op import Case, Make, Op, autocast
from ..checks.merge_runs import merge_runs as _check
from ._merge import average, gradient, remember


class Runs(NamedTuple):
    """What merge_runs returns."""

    tokens: Tensor
    size: Tensor
    index: Tensor
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
) -> Runs:
    """Merges every run of alike neighbours into its size-weighted mean, in the original order.

    Token t joins the run of token t−1 where their cosine (norms at least 1e-8) reaches `threshold` and the run holds fewer than
    `max_run` tokens. A NaN token is like nobody. Gradient to x. At most one host synchronisation (the number of runs); none if padded.

    Args:
        x: (B, P+N, C), float32, float16 or bfloat16. A last dimension that is not contiguous costs a copy.
        threshold: Least cosine of neighbours that merge, −1 … 1.
        max_run: Most tokens of a run, at least 1.
        size: (B, P+N) float32, how many tokens each one stands for (positive); 1 if not given.
        prefix: P, leading tokens (class token, registers) that pass through; the token behind them begins a run.
        padded: Outputs of the input's length, zeros behind the last run of every image, so that nothing waits for the count.
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        tokens: packed (total, C), image after image; padded (B, P+N, C).
        size: float32 (total,) or (B, P+N), the summed sizes.
        index: int64 (B, P+N), the output row of every token, so that un-merging is one gather; padded: the row within its image.
        offsets: int64 (B+1), how many rows the images before have: the first row of every image where packed.

    Raises:
        ValueError: shapes that do not fit, max_run below 1.
        TypeError: dtypes outside the list.

    Source: A-ToMe (Li et al. 2023), §3 (adjacent cosine, threshold); H-Net (Hwang et al. 2025), eq. 4–6 (chunks by cosine of neighbours).

    Example:
        >>> import torch, tokenkernels as tk
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
        >>> tk.merge_runs(x, 0.9).index
        tensor([[0, 0, 1]])
    """
    _check(x, threshold, max_run, size, prefix, padded, backend)
    (x,) = autocast(x)
    return Runs(*OP(backend, x.device.type, x, threshold, max_run, size, prefix, padded))


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
    rows = (batch, length) if padded else (torch.library.get_ctx().new_dynamic_size(),)
    index = x.new_empty((batch, length), dtype=torch.int64)
    offsets = x.new_empty(batch + 1, dtype=torch.int64)
    return x.new_empty((*rows, channels)), x.new_empty(rows, dtype=torch.float32), index, offsets


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    remember(ctx, inputs[3], output)


def _backward(run: Any, ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return gradient(run, ctx, grad), *[None] * 5


def _chain(t: Make, batch: int, length: int, channels: int) -> Tensor:
    """Tokens in runs of 1 … 6 around common directions: neighbours have cosines near 0.97 or near 0."""
    run = t.randint(0, 3, (batch, length)).eq(0).cumsum(1).clamp_max(length - 1)
    centre = t.randn(batch, length, channels, dtype=torch.float32).gather(1, run.unsqueeze(2).expand(-1, -1, channels))
    return (centre + 0.15 * t.randn(batch, length, channels, dtype=torch.float32)).to(t.dtype)


def _simple(batch: int, length: int, channels: int, sized: bool = False, **options: Any) -> Any:
    def make(t: Make) -> dict[str, Any]:
        size = t.rand(batch, length, dtype=torch.float32) + 0.5 if sized else None
        return {"x": _chain(t, batch, length, channels), "threshold": 0.8, "size": size} | options

    return make


def _hard(t: Make) -> dict[str, Any]:
    x = torch.ones(4, 40, 24, device=t.device, dtype=t.dtype)
    x[0] = 0
    x[1, ::7] = torch.nan
    x[2, 20:] = -1
    return {"x": x, "threshold": 0.5, "max_run": 5}


def _strided(t: Make) -> dict[str, Any]:
    x = _chain(t, 3, 30, 64).reshape(3, 30, 2, 32).transpose(0, 1)[:, :, 1].transpose(0, 1)
    return {"x": x, "threshold": 0.8, "size": (t.rand(30, 3, dtype=torch.float32) + 1).T, "prefix": 2}


def _cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    x = kwargs["x"]
    rows = x.shape[0] * x.shape[1] if kwargs.get("padded") else merge_runs(**kwargs, backend="reference").tokens.shape[0]
    moved = (x.numel() + rows * x.shape[2]) * x.element_size()
    return moved + x.shape[0] * x.shape[1] * 8, 6 * x.numel()


OP = Op(
    schema="merge_runs(Tensor x, float threshold, SymInt max_run, Tensor? size, SymInt prefix, bool padded) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=merge_runs,
    cases=[
        Case("ragged", _simple(3, 50, 19)),
        Case("size-prefix", _simple(2, 41, 33, sized=True, prefix=2)),
        Case("padded", _simple(2, 60, 70, padded=True)),
        Case("padded-size-prefix", _simple(3, 25, 16, sized=True, prefix=1, padded=True)),
        Case("max-run-2", _simple(2, 64, 8, max_run=2)),
        Case("max-run-1", _simple(2, 9, 8, max_run=1)),
        Case("all-merge", _simple(2, 33, 40, threshold=-1.0, max_run=1000)),
        Case("none-merge", _simple(2, 33, 40, threshold=1.1)),
        Case("one-token", _simple(3, 1, 5)),
        Case("all-prefix", _simple(2, 4, 5, prefix=4)),
        Case("zeros-nan-flip", _hard, ("test", "no-gradcheck", "nan")),
        Case("strided", _strided),
        Case("vit 64x197x768", _simple(64, 197, 768, prefix=1), ("bench",)),
        Case("speech 8x1500x512", _simple(8, 1500, 512), ("bench",)),
        Case("text 2x8192x1024", _simple(2, 8192, 1024), ("bench",)),
        Case("text 2x8192x1024 padded", _simple(2, 8192, 1024, padded=True), ("bench",)),
    ],
    bad=[
        (lambda kw: {"x": kw["x"][0]}, ValueError, "merge_runs: x: allowed 3 dimensions"),
        (lambda kw: {"x": kw["x"].long()}, TypeError, "merge_runs: x: allowed a tensor of float32"),
        (lambda kw: {"x": kw["x"].double()}, TypeError, 'backend="reference"'),
        (lambda kw: {"threshold": "0.8"}, TypeError, "merge_runs: threshold: allowed a number"),
        (lambda kw: {"max_run": 0}, ValueError, "merge_runs: max_run: allowed 1"),
        (lambda kw: {"max_run": 2.0}, TypeError, "merge_runs: max_run: allowed an int"),
        (lambda kw: {"prefix": -1}, ValueError, "merge_runs: prefix: allowed 0"),
        (lambda kw: {"prefix": 51}, ValueError, "merge_runs: prefix: allowed 0 … 50"),
        (lambda kw: {"padded": 1}, TypeError, "merge_runs: padded: allowed True, False"),
        (lambda kw: {"size": kw["x"][:, :, 0].double()}, TypeError, "merge_runs: size: allowed a tensor of float32"),
        (lambda kw: {"size": kw["x"][:, 1:, 0].float()}, ValueError, "merge_runs: size: allowed shape"),
    ],
    cost=_cost,
    length=lambda kwargs: kwargs["max_run"] if "max_run" in kwargs else 8,
    differentiable=("x",),
    backward=_backward,
    setup_context=_setup_context,
    batch=("x", "size"),
)
