"""gather_topk: select the most important tokens of every image and gather them, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from .._op import Op, autocast
from ..cases import gather_topk as cases
from ..checks import floating
from ..checks.gather_topk import gather_topk as _check
from ..checks.gather_topk import is_dense


class Selected(NamedTuple):
    """What gather_topk returns."""

    tokens: Any
    index: Tensor  # type: ignore[assignment]
    offsets: Tensor


def gather_topk(
    x: Tensor | Sequence[Tensor],
    scores: Tensor,
    k: int | Sequence[int] | Tensor | None = None,
    *,
    keep: Tensor | None = None,
    prefix: int = 0,
    order: str = "index",
    threshold: float | None = None,
    fuse: str | None = None,
    backend: str | None = None,
) -> Selected:
    """Gathers the k highest-scored tokens of every image; prefix tokens pass through in front.

    Ties go to the lower index; −0 equals +0; a NaN score ranks below −inf. Gradient to every
    floating x, and with `fuse` to the scores. No host synchronisation, but one where `k` is a
    tensor or `threshold` is given.

    Args:
        x: (B, P+N, C) or (B, P+N), or a sequence of up to 16 such tensors of any dtype (hidden
            states, positions, sizes), gathered by one selection. A last dimension that is not
            contiguous costs a copy.
        scores: (B, N), float32, float16 or bfloat16.
        k: Tokens to keep, 0…N; a sequence of B ints (or an int tensor (B)) for a budget per image.
        keep: (B, N) bool, tokens that are always in and count towards k; of more than k, the k
            best-scored ones.
        prefix: P, leading tokens (class token, registers) that are kept and not scored.
        order: "index" ascending, so that positions survive, or "score" descending.
        threshold: Instead of k: all tokens with score ≥ threshold.
        fuse: "sum" or "mean" appends one more token: the score-weighted sum Σ s·x of the dropped
            tokens, or that over Σ s (EViT).
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        tokens: with an int k (B, P+k(+1), C); else packed (total, C). A tuple where x is a
            sequence.
        index: int64, the chosen tokens, counted behind the prefix: (B, k), or packed.
        offsets: int64 (B+1), the first row of every image in the packed tokens.

    Raises:
        ValueError: shapes that do not fit, k outside 0…N, both or none of k and threshold.
        TypeError: dtypes outside the list, integer x with fuse.

    Source: EViT (Liang et al. 2022), eq. 4–5 for the fused token; FastV, VisionZip for the
        selection.

    Example:
        >>> import torch, tokenkernels as tk
        >>> x, scores = torch.arange(8.0).reshape(1, 4, 2), torch.tensor([[0.1, 0.9, 0.2, 0.8]])
        >>> tk.gather_topk(x, scores, 2).index
        tensor([[1, 3]])
    """
    one = not isinstance(x, (list, tuple))
    tensors = (x,) if one else tuple(x)
    tensors = tuple(autocast(t)[0] if getattr(t, "ndim", 0) == 3 else t for t in tensors)
    budgets = _check(tensors, scores, k, keep, prefix, order, threshold, fuse, backend)
    if torch.is_grad_enabled():
        for t in tensors:
            if t.requires_grad:
                floating("gather_topk", "x (with a gradient)", t, backend)
    ragged = k is not None and not is_dense(k)
    outputs, index, offsets = OP(
        backend,
        scores.device.type,
        tensors,
        scores,
        keep,
        budgets,
        ragged,
        threshold,
        prefix,
        order,
        fuse or "",
    )
    return Selected(outputs[0] if one else tuple(outputs), index, offsets)


def _ranking(scores: Tensor) -> Tensor:
    """Tokens of one image by descending score, NaN last, equal scores by ascending index."""
    values = torch.where(scores.isnan(), -torch.inf, scores)
    by_value = torch.sort(values, descending=True, stable=True).indices
    return by_value[torch.sort(scores[by_value].isnan().int(), stable=True).indices]


def _choose(
    scores: Tensor, keep: Tensor | None, budget: int | None, threshold: float | None, order: str
) -> Tensor:
    ranking = _ranking(scores)
    if threshold is not None:
        chosen = scores.to(torch.promote_types(scores.dtype, torch.float32)) >= threshold
        if keep is not None:
            chosen = chosen | keep
    else:
        first = ranking
        if keep is not None:
            first = ranking[torch.sort(keep[ranking].int(), descending=True, stable=True).indices]
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[first[:budget]] = True
    return ranking[chosen[ranking]] if order == "score" else chosen.nonzero()[:, 0]


def _fused_row(x: Tensor, scores: Tensor, chosen: Tensor, fuse: str) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = scores.to(wide).index_fill(0, chosen, 0)
    dropped = torch.ones_like(weight, dtype=torch.bool).index_fill(0, chosen, False)
    rows = x.to(wide)[dropped]
    weight = weight[dropped].reshape(-1, *[1] * (x.ndim - 1))
    total = (weight * rows).sum(0, keepdim=True)
    if fuse == "mean" and weight.sum() != 0:
        total = total / weight.sum()
    return total.to(x.dtype)


def _reference(
    tensors: list[Tensor],
    scores: Tensor,
    keep: Tensor | None,
    k: list[int],
    ragged: bool,
    threshold: float | None,
    prefix: int,
    order: str,
    fuse: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    batch = scores.shape[0]
    dense = threshold is None and not ragged
    budgets = [None] * batch if threshold is not None else k if ragged else k * batch
    chosen = [
        _choose(scores[b], None if keep is None else keep[b], budgets[b], threshold, order)
        for b in range(batch)
    ]
    outputs = []
    for x in tensors:
        rows = []
        for b in range(batch):
            parts = [x[b, :prefix], x[b, prefix:][chosen[b]]]
            if fuse:
                parts.append(_fused_row(x[b, prefix:], scores[b], chosen[b], fuse))
            rows.append(torch.cat(parts))
        empty = x.new_empty(
            (0, prefix + k[0] + bool(fuse), *x.shape[2:]) if dense else (0, *x.shape[2:])
        )
        outputs.append((torch.stack(rows) if dense else torch.cat(rows)) if rows else empty)
    lengths = torch.tensor(
        [0, *(prefix + len(c) + bool(fuse) for c in chosen)], device=scores.device
    )
    if not chosen:
        return outputs, scores.new_empty((0, k[0]) if dense else (0,), dtype=torch.int64), lengths
    return outputs, torch.stack(chosen) if dense else torch.cat(chosen), lengths.cumsum(0)


def _fake(
    tensors: list[Tensor],
    scores: Tensor,
    keep: Tensor | None,
    k: list[int],
    ragged: bool,
    threshold: float | None,
    prefix: int,
    order: str,
    fuse: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    batch = scores.shape[0]
    extra = prefix + bool(fuse)
    offsets = scores.new_empty(batch + 1, dtype=torch.int64)
    if threshold is None and not ragged:
        outputs = [x.new_empty((batch, extra + k[0], *x.shape[2:])) for x in tensors]
        return outputs, scores.new_empty((batch, k[0]), dtype=torch.int64), offsets
    chosen = sum(k) if ragged else library.get_ctx().new_dynamic_size()
    outputs = [x.new_empty((chosen + batch * extra, *x.shape[2:])) for x in tensors]
    return outputs, scores.new_empty(chosen, dtype=torch.int64), offsets


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    tensors, scores, _, _, _, _, prefix, _, fuse = inputs
    _, index, offsets = output
    ctx.floating = [x.dtype.is_floating_point for x in tensors]
    ctx.prefix, ctx.fuse, ctx.count = prefix, fuse, len(tensors)
    kept = [x for x in tensors if fuse and x.dtype.is_floating_point]
    ctx.save_for_backward(index, offsets, scores, *kept)


def _backward(
    run: Any, ctx: Any, grads: list[Tensor | None], _index: Any, _offsets: Any
) -> tuple[Any, ...]:
    index, offsets, scores, *tensors = ctx.saved_tensors
    wanted = [g for g, floating in zip(grads, ctx.floating, strict=True) if floating]
    results, scores_grad = run(
        BACKWARD, wanted, index, offsets, tensors, scores, ctx.prefix, ctx.fuse
    )
    results = iter(results)
    x_grads = [next(results) if floating else None for floating in ctx.floating]
    return x_grads, scores_grad.to(scores.dtype) if ctx.fuse else None, *[None] * 7


def _backward_reference(
    gradients: list[Tensor],
    index: Tensor,
    offsets: Tensor,
    tensors: list[Tensor],
    scores: Tensor,
    prefix: int,
    fuse: str,
) -> tuple[list[Tensor], Tensor]:
    batch, tokens = scores.shape
    wide = torch.promote_types(gradients[0].dtype if gradients else scores.dtype, torch.float32)
    weights = scores.to(wide)
    scores_grad = weights.new_zeros(batch, tokens) if fuse else weights.new_zeros(0, 0)
    starts = offsets.tolist()
    extra = prefix + bool(fuse)
    packed = index.reshape(-1)
    results = []
    for t, gradient in enumerate(gradients):
        gradient = gradient.flatten(0, 1) if index.ndim == 2 else gradient
        result = gradient.new_zeros((batch, prefix + tokens, *gradient.shape[1:]))
        for b in range(batch):
            rows, chosen = (
                gradient[starts[b] : starts[b + 1]],
                packed[starts[b] - b * extra : starts[b + 1] - (b + 1) * extra],
            )
            result[b, :prefix] = rows[:prefix]
            if fuse:
                dropped = torch.ones_like(weights[b], dtype=torch.bool).index_fill(0, chosen, False)
                w, g, x = (
                    weights[b][dropped],
                    rows[-1].to(wide).reshape(-1),
                    tensors[t][b, prefix:][dropped].to(wide),
                )
                share = x.reshape(len(w), len(g)) @ g
                total = w.sum() if fuse == "mean" and w.sum() != 0 else w.new_ones(())
                if fuse == "mean" and w.sum() != 0:
                    share = share - (w @ share) / total
                scores_grad[b, dropped] += share / total
                result[b, prefix:][dropped] = (
                    (w[:, None] / total * g).reshape(x.shape).to(result.dtype)
                )
            result[b, prefix + chosen] = rows[prefix : prefix + len(chosen)]
        results.append(result)
    return results, scores_grad.to(torch.promote_types(torch.float32, scores_grad.dtype))


def _backward_fake(
    gradients: list[Tensor],
    index: Tensor,
    offsets: Tensor,
    tensors: list[Tensor],
    scores: Tensor,
    prefix: int,
    fuse: str,
) -> tuple[list[Tensor], Tensor]:
    batch, tokens = scores.shape
    results = [g.new_empty((batch, prefix + tokens, *g.shape[index.ndim :])) for g in gradients]
    wide = torch.promote_types(torch.float32, scores.dtype)
    return results, scores.new_empty((batch, tokens) if fuse else (0, 0), dtype=wide)


BACKWARD = Op(
    schema="gather_topk_backward(Tensor[] gradients, Tensor index, Tensor offsets, "
    "Tensor[] tensors, Tensor scores, SymInt prefix, str fuse) -> (Tensor[], Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    cases=cases.BACKWARD_CASES,
    length=cases.backward_length,
    launches=lambda kwargs: (2 if kwargs["fuse"] else 1, 0),
)

OP = Op(
    schema="gather_topk(Tensor[] tensors, Tensor scores, Tensor? keep, SymInt[] k, bool ragged, "
    "float? threshold, SymInt prefix, str order, str fuse) -> (Tensor[], Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=gather_topk,
    cases=cases.CASES,
    bad=cases.BAD,
    cost=cases.cost,
    length=lambda kwargs: kwargs["scores"].shape[1] if kwargs.get("fuse") else 1,
    differentiable=("x", "scores"),
    backward=_backward,
    setup_context=_setup_context,
    batch=("x", "scores", "keep"),
    sizes=("k",),
    launches=cases.launches,
    waits=lambda kwargs: int(not isinstance(kwargs.get("k"), (int, list, tuple))),
)
