"""aggregate_logits: M slots from N tokens, each a softmax-weighted mean over the tokens, with the
logits given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._op import Op, autocast
from ..cases import aggregate_logits as cases
from ..checks.aggregate_logits import aggregate_logits as _check


def aggregate_logits(
    logits: Tensor, value: Tensor, *, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Gathers N tokens into M slots: out[b, m] = Σ_n softmax_n(logits[b, n, m]) · value[b, n].

    The softmax runs over the tokens of each slot, in float32, down the columns as they lie.
    Gradients to logits and value, made from the logits again: nothing of size M×N is kept. Under
    autocast both are cast.

    Args:
        logits: (B, N, M), float32, float16 or bfloat16: what any router gives, noise and bias
            included.
        value: (B, N, C), the same dtype. A last dimension that is not contiguous costs a copy, of
            logits too.
        mask: (B, N) bool, True where a token takes part. What the others hold, NaN included, never
            shows.
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        (B, M, C); a slot that no token reaches (all masked, or all logits −inf) is zero.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes outside the list or not equal.

    Source: TokenLearner (Ryoo et al. 2021), eq. 2, with a softmax; the dispatch of Soft MoE
    (Puigcerver et al. 2024), eq. 1–2.

    Example:
        >>> import torch, tokenkernels as tk
        >>> tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> tk.aggregate_logits(torch.zeros(1, 2, 1), tokens)
        tensor([[[2., 3.]]])
    """
    logits, value = autocast(logits, value)
    _check(logits, value, mask, backend)
    tokens, _ = OP(backend, value.device.type, logits, value, mask)
    return tokens


def _softmax(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights over dim 1 and the logarithm of their total, in float32 (float64 stays); all zero
    where every logit is −inf.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None], -torch.inf)
    if scores.shape[1] == 0:
        return scores, scores.new_full((scores.shape[0], scores.shape[2]), -torch.inf)
    empty = (scores == -torch.inf).all(1, keepdim=True)
    scores = scores.masked_fill(empty, 0)
    lse = torch.logsumexp(scores, 1).masked_fill(empty[:, 0], -torch.inf)
    return torch.softmax(scores, 1).masked_fill(empty, 0), lse


def _visible(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else torch.where(mask[..., None], value, 0)


def _reference(logits: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    weights, lse = _softmax(logits, mask)
    return (weights.mT @ _visible(value, mask).to(weights.dtype)).to(value.dtype), lse


def _fake(logits: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, slots = logits.shape
    lse = value.new_empty((batch, slots), dtype=torch.promote_types(value.dtype, torch.float32))
    return value.new_empty((batch, slots, value.shape[2])), lse


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, value, mask = inputs
    ctx.needs = logits.requires_grad, value.requires_grad
    ctx.save_for_backward(logits, value, mask, *output)


def _backward(run: Any, ctx: Any, gradient: Tensor, _lse: Any) -> tuple[Any, ...]:
    results = run(BACKWARD, gradient, *ctx.saved_tensors, *ctx.needs)
    return (*(g if need else None for g, need in zip(results, ctx.needs, strict=True)), None)


def _backward_reference(
    gradient: Tensor,
    logits: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tokens: Tensor,
    lse: Tensor,
    need_logits: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor]:
    weights, _ = _softmax(logits, mask)
    v, g = _visible(value, mask).to(weights.dtype), gradient.to(weights.dtype)
    logits_grad, value_grad = value.new_empty(0), value.new_empty(0)
    if need_logits:
        mean = (g * tokens.to(weights.dtype)).sum(-1)
        logits_grad = (weights * (v @ g.mT - mean[:, None])).to(logits.dtype)
    if need_value:
        value_grad = (weights @ g).to(value.dtype)
    return logits_grad, value_grad


def _backward_fake(
    gradient: Tensor,
    logits: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tokens: Tensor,
    lse: Tensor,
    need_logits: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor]:
    return (
        value.new_empty(logits.shape if need_logits else (0,)),
        value.new_empty(value.shape if need_value else (0,)),
    )


BACKWARD = Op(
    schema="aggregate_logits_backward(Tensor gradient, Tensor logits, Tensor value, Tensor? mask, "
    "Tensor tokens, Tensor lse, bool need_logits, bool need_value) -> (Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    cases=cases.BACKWARD_CASES,
    length=cases.length,
    launches=lambda kwargs: (1, 0),
)

OP = Op(
    schema="aggregate_logits(Tensor logits, Tensor value, Tensor? mask) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=aggregate_logits,
    cases=cases.CASES,
    bad=cases.BAD,
    cost=cases.cost,
    length=cases.length,
    differentiable=("logits", "value"),
    backward=_backward,
    setup_context=_setup_context,
    batch=("logits", "value", "mask"),
    launches=lambda kwargs: (1 if kwargs["value"].shape[1] < 1024 else 2, 1),
)
