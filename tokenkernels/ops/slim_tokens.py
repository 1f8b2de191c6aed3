"""slim_tokens: SiT's token slimming, from layer norm to aggregation, in one call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Op, autocast
from ..cases import slim_tokens as cases
from ..checks.slim_tokens import slim_tokens as _check


def slim_tokens(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale: Tensor | float = 1.0,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Replaces N tokens by M weighted means of them; a network of the tokens chooses the weights.

    out = Pᵀ·x with P = softmax over the tokens of scale · GELU(LN(x)·w1ᵀ + b1)·w2ᵀ and the exact
    (erf) GELU. The normalised tokens and, without gradients, the hidden ones never reach memory;
    where a gradient is needed, the projection before the GELU is kept in float32. A bias behind w2
    would be constant along the softmax and cancel: there is none. Gradient to all seven arguments.
    In bfloat16, on a processor that multiplies pairs of it, LN(x), the hidden tokens and P are
    rounded to bfloat16 on the way, sums and softmax stay float32: the result is about as
    far from the exact one as the formula run in bfloat16; a sharp softmax magnifies both roundings.

    Args:
        x: (B, N, C), float32, float16 or bfloat16. A last dimension that is not contiguous costs a
            copy, in w1 and w2 as well.
        norm_weight: (C), of the layer norm, in the dtype of x like all weights.
        norm_bias: (C).
        w1: (H, C), the projection.
        b1: (H).
        w2: (M, H), one row per slot.
        scale: Multiplies the logits; a number, or a floating tensor without dimensions.
        eps: Added to the variance in the layer norm.
        backend: "native", "triton" or "reference"; the best one there by default.

    Returns:
        (B, M, C), in the dtype of x.

    Raises:
        ValueError: shapes that do not fit together, no tokens, eps that is not positive.
        TypeError: dtypes outside the list or mixed.

    Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, section 3.1, eq. 2–3.

    Example:
        >>> import torch, tokenkernels as tk
        >>> x, one, zero = torch.randn(1, 196, 384), torch.ones(384), torch.zeros(384)
        >>> w1, b1, w2 = torch.randn(192, 384), torch.zeros(192), torch.randn(98, 192)
        >>> tk.slim_tokens(x, one, zero, w1, b1, w2).shape
        torch.Size([1, 98, 384])
    """
    tensors = autocast(x, norm_weight, norm_bias, w1, b1, w2)
    _check(tensors, scale, eps, backend)
    learned = isinstance(scale, Tensor)
    inputs = (*tensors, scale) if isinstance(scale, Tensor) else tensors
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return OP(
        backend,
        x.device.type,
        *tensors,
        scale if learned else None,
        1.0 if learned else float(scale),
        float(eps),
        keep,
    )[0]


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, g, b, w1, b1, w2 = _wide(x, norm_weight, norm_bias, w1, b1, w2)
    projected = F.linear(F.layer_norm(wide, wide.shape[-1:], g, b, eps), w1, b1)
    factor = scale if scale_tensor is None else scale_tensor.to(wide.dtype)
    logits = factor * F.linear(F.gelu(projected), w2)
    tokens = logits.softmax(1).transpose(1, 2) @ wide
    return tokens.to(x.dtype), logits.logsumexp(1), projected if keep else projected.new_empty(0)


def _fake(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, tokens, channels), (slots, hidden) = x.shape, w2.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    lse = x.new_empty((batch, slots), dtype=wide)
    return (
        x.new_empty((batch, slots, channels)),
        lse,
        x.new_empty((batch, tokens, hidden) if keep else (0,), dtype=wide),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, scale_tensor, ctx.scale, ctx.eps, _ = inputs
    tokens, lse, projected = output
    ctx.mark_non_differentiable(lse, projected)
    ctx.set_materialize_grads(False)
    ctx.learned = scale_tensor is not None
    ctx.save_for_backward(
        *tensors, tokens, lse, projected, *([scale_tensor] if ctx.learned else [])
    )


def _backward(
    run: Any, ctx: Any, grad: Tensor | None, _lse: Any, _projected: Any
) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # once: recomputed activations are given out only once
    *tensors, tokens, lse, projected = saved[:9]
    scale_tensor = saved[9] if ctx.learned else None
    *grads, scale_grad = run(
        BACKWARD, grad, *tensors, scale_tensor, ctx.scale, ctx.eps, tokens, lse, projected
    )
    if scale_tensor is None:
        return *grads, None, None, None, None
    return *grads, scale_grad.to(scale_tensor.dtype), None, None, None


def _backward_reference(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    eps: float,
    tokens: Tensor,
    lse: Tensor,
    projected: Tensor,
) -> tuple[Tensor, ...]:
    dtype = x.dtype
    grad, x, norm_weight, norm_bias, w1, b1, w2 = _wide(grad, x, norm_weight, norm_bias, w1, b1, w2)
    factor = scale if scale_tensor is None else scale_tensor.to(x.dtype)
    centred = x - x.mean(-1, keepdim=True)
    rstd = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    standard = centred * rstd
    normal = standard * norm_weight + norm_bias
    projected = F.linear(normal, w1, b1)
    cdf = 0.5 * (1 + torch.erf(projected * 0.5**0.5))
    hidden = projected * cdf
    raw = hidden @ w2.T
    weights = (factor * raw).softmax(1)

    shares = x @ grad.transpose(1, 2)
    logits_grad = weights * (shares - (weights * shares).sum(1, keepdim=True))
    raw_grad = factor * logits_grad
    slope = cdf + projected * torch.exp(-0.5 * projected**2) * (2 * torch.pi) ** -0.5
    projected_grad = (raw_grad @ w2) * slope
    normal_grad = projected_grad @ w1
    t = normal_grad * norm_weight
    through_norm = rstd * (
        t - t.mean(-1, keepdim=True) - standard * (t * standard).mean(-1, keepdim=True)
    )
    grads = (
        weights @ grad + through_norm,
        (normal_grad * standard).sum((0, 1)),
        normal_grad.sum((0, 1)),
        torch.einsum("bnh,bnc->hc", projected_grad, normal),
        projected_grad.sum((0, 1)),
        torch.einsum("bnm,bnh->mh", raw_grad, hidden),
    )
    return *(g.to(dtype) for g in grads), (logits_grad * raw).sum()


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    eps: float,
    tokens: Tensor,
    lse: Tensor,
    projected: Tensor,
) -> tuple[Tensor, ...]:
    return *(t.new_empty(t.shape) for t in (x, norm_weight, norm_bias, w1, b1, w2)), lse.new_empty(
        ()
    )


BACKWARD = Op(
    schema="slim_tokens_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, "
    "Tensor w1, Tensor b1, Tensor w2, Tensor? scale_tensor, float scale, float eps, Tensor tokens, "
    "Tensor lse, Tensor projected) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    cases=cases.BACKWARD_CASES,
    length=cases.gradient_length,
    compare=cases.compare_gradients,
    launches=cases.backward_launches,
)

OP = Op(
    schema="slim_tokens(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor b1, "
    "Tensor w2, Tensor? scale_tensor, float scale, float eps, bool keep) -> "
    "(Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=slim_tokens,
    cases=cases.CASES,
    bad=cases.BAD,
    cost=cases.cost,
    length=cases.length,
    gradient_length=cases.gradient_length,
    formula=cases.formula,
    differentiable=("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "scale"),
    backward=_backward,
    setup_context=_setup_context,
    batch=("x",),
    launches=cases.launches,
)
