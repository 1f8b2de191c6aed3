"""aggregate_soft: M slots from N tokens, each a softmax-weighted mean over the tokens; attention
without heads or projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._op import Op, autocast
from ..cases import aggregate_soft as cases
from ..checks.aggregate_soft import aggregate_soft as _check


def aggregate_soft(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    return_weights: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gathers N tokens into M slots: out[b, m] = Σ_n softmax_n(scale·⟨query[m], key[b, n]⟩ +
    bias[b, n]) · value[b, n].

    The softmax runs over the tokens of each slot; scores, softmax and sums are float32. Gradients
    to query, key, value, bias and a tensor scale. For them the softmax is kept where it is no
    larger than the values (M × 4 bytes ≤ a row of value) and the scale is no parameter, else made
    again; without gradients nothing of size M×N exists. Sizes are free: M > N, N = 1 and E ≠ C are
    fine. Under autocast query, key and value are cast.

    Args:
        query: (M, E), shared by all images, or (B, M, E); float32, float16 or bfloat16.
        key: (B, N, E), the same dtype. It may be `value` itself. A last dimension that is not
            contiguous costs a copy, here and below.
        value: (B, N, C), the same dtype.
        scale: Multiplies the scores; a tensor of 0 dimensions is read inside the kernel and gets a
            gradient.
        bias: (B, N), added to the scores of a token, such as the logarithm of its size; any
            floating dtype.
        mask: (B, N) bool, True where a token takes part. What the others hold, NaN included, never
            shows.
        return_weights: Also return the softmax, without gradient.
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        (B, M, C); a slot that no token reaches (all masked, or all scores −inf) is zero. With
        `return_weights` a tuple of that and the weights (B, M, N) in the same dtype.

    Raises:
        ValueError: shapes that do not fit, a scale with dimensions.
        TypeError: dtypes outside the list or not equal.

    Source: SiT (Zong et al. 2022), eq. 2–3, the token slimming module; the same form serves
    TokenLearner v1.1, PatchMerger, the dispatch of Soft MoE (Puigcerver et al. 2024, eq. 1–2) and
    attention pooling.

    Example:
        >>> import torch, tokenkernels as tk
        >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
        >>> tk.aggregate_soft(torch.tensor([[1000.0, -1000.0]]), tokens, tokens)
        tensor([[[1., 0.]]])
    """
    query, key, value = autocast(query, key, value)
    _check(query, key, value, scale, bias, mask, return_weights, backend)
    wide = torch.promote_types(query.dtype, torch.float32)
    scale_tensor = scale.to(wide) if isinstance(scale, Tensor) else None
    if bias is not None:
        bias = bias.to(wide)
    fits = 4 * query.shape[-2] <= value.shape[-1] * value.element_size()
    keep = return_weights or (
        fits and not _wants_gradient(scale_tensor) and _wants_gradient(query, key, value, bias)
    )
    tokens, _, weights = OP(
        backend,
        value.device.type,
        query,
        key,
        value,
        bias,
        mask,
        scale_tensor,
        1.0 if scale_tensor is not None else float(scale),
        keep,
    )
    return (tokens, weights.detach().mT.to(tokens.dtype)) if return_weights else tokens


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _scores(
    query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, scale: Tensor | float
) -> Tensor:
    """(B, N, M) in float32 (float64 stays), −inf where masked."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if mask is not None:
        key = torch.where(mask[..., None], key, 0)
    scores = scale * (key.to(wide) @ query.to(wide).mT)
    if bias is not None:
        scores = scores + bias[..., None]
    return scores if mask is None else scores.masked_fill(~mask[..., None], -torch.inf)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over dim 1 and the logarithm of their total; all zero where every score is −inf."""
    if scores.shape[1] == 0:
        return scores, scores.new_full((scores.shape[0], scores.shape[2]), -torch.inf)
    empty = (scores == -torch.inf).all(1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(empty, 0), 1).masked_fill(empty[:, 0], -torch.inf)
    return torch.softmax(scores.masked_fill(empty, 0), 1).masked_fill(empty, 0), lse


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    keep_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights, lse = _softmax(
        _scores(query, key, bias, mask, scale if scale_tensor is None else scale_tensor)
    )
    if mask is not None:
        value = torch.where(mask[..., None], value, 0)
    tokens = (weights.mT @ value.to(weights.dtype)).to(value.dtype)
    return tokens, lse, weights if keep_weights else weights.new_empty(0)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    keep_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _ = key.shape
    slots, wide = query.shape[-2], torch.promote_types(value.dtype, torch.float32)
    weights = (batch, tokens, slots) if keep_weights else (0,)
    return (
        value.new_empty((batch, slots, value.shape[2])),
        value.new_empty((batch, slots), dtype=wide),
        value.new_empty(weights, dtype=wide),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    query, key, value, bias, mask, scale_tensor, scale, keep_weights = inputs
    tokens, lse, weights = output
    ctx.scale, ctx.kept = scale, keep_weights
    ctx.needs = tuple(t is not None and t.requires_grad for t in (query, key, value, scale_tensor))
    ctx.save_for_backward(
        query,
        key,
        value,
        bias,
        mask,
        scale_tensor,
        tokens,
        lse,
        *([weights] if keep_weights else []),
    )


def _backward(run: Any, ctx: Any, gradient: Tensor, _lse: Any, _weights: Any) -> tuple[Any, ...]:
    query, key, value, bias, mask, scale_tensor, tokens, lse, *weights = ctx.saved_tensors
    results = run(
        BACKWARD,
        gradient,
        query,
        key,
        value,
        bias,
        mask,
        scale_tensor,
        ctx.scale,
        tokens,
        lse,
        weights[0] if weights else None,
        *ctx.needs,
    )
    wanted = (*ctx.needs[:3], bias is not None, ctx.needs[3])
    query_grad, key_grad, value_grad, bias_grad, scale_grad = (
        g if w else None for g, w in zip(results, wanted, strict=True)
    )
    return query_grad, key_grad, value_grad, bias_grad, None, scale_grad, None, None


def _backward_reference(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    tokens: Tensor,
    lse: Tensor,
    weights: Tensor | None,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = scale if scale_tensor is None else scale_tensor
    if mask is not None:
        key, value = torch.where(mask[..., None], key, 0), torch.where(mask[..., None], value, 0)
    if weights is None:
        weights, _ = _softmax(_scores(query, key, bias, mask, factor))
    q, k, v, g = (t.to(wide) for t in (query, key, value, gradient))
    mean = (g * tokens.to(wide)).sum(-1)
    scores_grad = weights * (v @ g.mT - mean[:, None])
    if mask is not None:
        scores_grad = scores_grad.masked_fill(~mask[..., None], 0)
    query_grad, key_grad, value_grad = (query.new_empty(0) for _ in range(3))
    if need_query:
        images = scores_grad.mT @ k
        query_grad = (factor * (images.sum(0) if query.ndim == 2 else images)).to(query.dtype)
    if need_key:
        key_grad = (factor * scores_grad @ q).to(key.dtype)
    if need_value:
        value_grad = (weights @ g).to(value.dtype)
    bias_grad = scores_grad.sum(-1) if bias is not None else g.new_empty(0)
    scale_grad = (scores_grad * (k @ q.mT)).sum() if need_scale else g.new_empty(0)
    return query_grad, key_grad, value_grad, bias_grad, scale_grad


def _backward_fake(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    tokens: Tensor,
    lse: Tensor,
    weights: Tensor | None,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(query.shape if need_query else (0,)),
        query.new_empty(key.shape if need_key else (0,)),
        query.new_empty(value.shape if need_value else (0,)),
        query.new_empty(bias.shape if bias is not None else (0,), dtype=wide),
        query.new_empty(() if need_scale else (0,), dtype=wide),
    )


BACKWARD = Op(
    schema="aggregate_soft_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, "
    "Tensor? bias, Tensor? mask, Tensor? scale_tensor, float scale, Tensor tokens, Tensor lse, "
    "Tensor? weights, bool need_query, bool need_key, bool need_value, bool need_scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    cases=cases.BACKWARD_CASES,
    length=lambda kwargs: 4 * cases.length(kwargs),
    launches=lambda kwargs: (3, 0),
)

OP = Op(
    schema="aggregate_soft(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, "
    "Tensor? scale_tensor, float scale, bool keep_weights) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=aggregate_soft,
    cases=cases.CASES,
    bad=cases.BAD,
    cost=cases.cost,
    length=cases.length,
    differentiable=("query", "key", "value", "bias", "scale"),
    backward=_backward,
    setup_context=_setup_context,
    batch=("key", "value", "bias", "mask"),
    launches=cases.launches,
)
