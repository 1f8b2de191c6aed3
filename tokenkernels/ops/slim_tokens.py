"""slim_tokens: SiT's token slimming, from layer norm to aggregation, in one call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Case, Make, Op, autocast
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
    """Replaces N tokens by M weighted means of them; a small network of the tokens chooses the weights.

    out = Pᵀ·x with P = softmax over the tokens of scale · GELU(LN(x)·w1ᵀ + b1)·w2ᵀ, exact (erf) GELU. The normalised tokens and, without
    gradients, the hidden ones never reach memory; where a gradient is needed, the projection before the GELU is kept in float32. A
    bias behind w2 would be constant along the softmax and cancel: there is none. Gradient to all seven arguments.

    Args:
        x: (B, N, C), float32, float16 or bfloat16. A last dimension that is not contiguous costs a copy; so it does in w1 and w2.
        norm_weight: (C), of the layer norm, in the dtype of x as all weights.
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
        >>> tk.slim_tokens(x, one, zero, torch.randn(192, 384), torch.zeros(192), torch.randn(98, 192)).shape
        torch.Size([1, 98, 384])
    """
    tensors = (x, norm_weight, norm_bias, w1, b1, w2)
    if all(isinstance(t, Tensor) for t in tensors):
        tensors = autocast(*tensors)
    _check(tensors, scale, eps, backend)
    learned = isinstance(scale, Tensor)
    keep = torch.is_grad_enabled() and (any(t.requires_grad for t in tensors) or (learned and scale.requires_grad))
    return OP(
        backend, x.device.type, *tensors, scale if learned else None, 1.0 if learned else float(scale), float(eps), keep
    )[0]  # fmt: skip


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, scale_tensor: Tensor | None,
    scale: float, eps: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide, g, b, w1, b1, w2 = _wide(x, norm_weight, norm_bias, w1, b1, w2)
    projected = F.linear(F.layer_norm(wide, wide.shape[-1:], g, b, eps), w1, b1)
    factor = scale if scale_tensor is None else scale_tensor.to(wide.dtype)
    logits = factor * F.linear(F.gelu(projected), w2)
    tokens = logits.softmax(1).transpose(1, 2) @ wide
    return tokens.to(x.dtype), logits.logsumexp(1), projected if keep else projected.new_empty(0)


def _fake(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, scale_tensor: Tensor | None,
    scale: float, eps: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, tokens, channels), (slots, hidden) = x.shape, w2.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    lse = x.new_empty((batch, slots), dtype=wide)
    return x.new_empty((batch, slots, channels)), lse, x.new_empty((batch, tokens, hidden) if keep else (0,), dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, scale_tensor, ctx.scale, ctx.eps, _ = inputs
    tokens, lse, projected = output
    ctx.mark_non_differentiable(lse, projected)
    ctx.set_materialize_grads(False)
    ctx.learned = scale_tensor is not None
    ctx.save_for_backward(*tensors, tokens, lse, projected, *([scale_tensor] if ctx.learned else []))


def _backward(run: Any, ctx: Any, grad: Tensor | None, _lse: Any, _projected: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    *tensors, tokens, lse, projected = ctx.saved_tensors[:9]
    scale_tensor = ctx.saved_tensors[9] if ctx.learned else None
    *grads, scale_grad = run(BACKWARD, grad, *tensors, scale_tensor, ctx.scale, ctx.eps, tokens, lse, projected)
    return *grads, scale_grad.to(scale_tensor.dtype) if ctx.learned else None, None, None, None


def _backward_reference(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    scale_tensor: Tensor | None, scale: float, eps: float, tokens: Tensor, lse: Tensor, projected: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
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
    through_norm = rstd * (t - t.mean(-1, keepdim=True) - standard * (t * standard).mean(-1, keepdim=True))
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
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    scale_tensor: Tensor | None, scale: float, eps: float, tokens: Tensor, lse: Tensor, projected: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    return *(t.new_empty(t.shape) for t in (x, norm_weight, norm_bias, w1, b1, w2)), lse.new_empty(())


def _shapes(batch: int, tokens: int, channels: int, slots: int, hidden: int | None = None, **options: Any) -> Any:
    def make(t: Make) -> dict[str, Any]:
        width = channels // 2 if hidden is None else hidden
        scale = options.get("scale", torch.tensor(1.5, dtype=t.dtype, device=t.device))
        return {
            "x": t.randn(batch, tokens, channels),
            "norm_weight": (1 + 0.2 * t.randn(channels, dtype=torch.float32)).to(t.dtype),
            "norm_bias": 0.1 * t.randn(channels),
            "w1": (t.randn(width, channels, dtype=torch.float32) / channels**0.5).to(t.dtype),
            "b1": 0.1 * t.randn(width),
            "w2": (4 * t.randn(slots, width, dtype=torch.float32) / width**0.5).to(t.dtype),
        } | options | {"scale": scale}  # fmt: skip

    return make


def _patches(t: Make) -> dict[str, Any]:
    """Patch tokens behind a class token: what a model passes, read in place."""
    kwargs = _shapes(3, 20, 16, 7)(t)
    return kwargs | {"x": kwargs["x"][:, 1:]}


def _far(t: Make) -> dict[str, Any]:
    """Tokens away from the origin."""
    kwargs = _shapes(2, 30, 24, 6, scale=2.0)(t)
    return kwargs | {"x": kwargs["x"] + 5}


def _cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    x, slots, hidden = kwargs["x"], *kwargs["w2"].shape
    batch, tokens, channels = x.shape
    numbers = batch * (tokens + slots) * channels + hidden * (channels + slots)
    macs = batch * tokens * (channels * hidden + hidden * slots + slots * channels)
    return numbers * x.element_size(), 2 * macs


def _length(kwargs: dict[str, Any]) -> int:
    """The sums of layer norm, projection, logits and aggregation, one behind the other."""
    return kwargs["x"].shape[1] + 2 * kwargs["x"].shape[2] + kwargs["w1"].shape[0]


CASES = [
    Case("small", _shapes(2, 37, 48, 11)),
    Case("odd", _shapes(3, 23, 21, 5, hidden=9, scale=0.7)),
    Case("one-token", _shapes(2, 1, 20, 3)),
    Case("more-slots", _shapes(2, 6, 17, 19, hidden=33)),
    Case("negative-scale", _shapes(1, 40, 32, 4, scale=-2.0, eps=1e-3)),
    Case("patches", _patches),
    Case("far", _far),
    Case("tiles", _shapes(2, 300, 18, 17)),
    Case("sit-s stage 1 16x196x384 M=98", _shapes(16, 196, 384, 98), ("bench",)),
    Case("sit-s stage 2 16x98x384 M=49", _shapes(16, 98, 384, 49), ("bench",)),
    Case("sit-s stage 3 16x49x384 M=24", _shapes(16, 49, 384, 24), ("bench",)),
]

BACKWARD = Op(
    schema="slim_tokens_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor b1, Tensor w2, "
    "Tensor? scale_tensor, float scale, float eps, Tensor tokens, Tensor lse, Tensor projected) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    cases=[],
)

OP = Op(
    schema="slim_tokens(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor b1, Tensor w2, Tensor? scale_tensor, "
    "float scale, float eps, bool keep) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    function=slim_tokens,
    cases=CASES,
    bad=[
        (lambda kw: {"x": kw["x"][0]}, ValueError, "slim_tokens: x: allowed 3 dimensions"),
        (lambda kw: {"x": kw["x"][:, :0]}, ValueError, "slim_tokens: x: allowed at least one token"),
        (lambda kw: {"x": kw["x"][..., :-1]}, ValueError, "slim_tokens: norm_weight: allowed shape \\(47\\)"),
        (lambda kw: {"x": kw["x"].long()}, TypeError, "slim_tokens: x: allowed a tensor of float32"),
        (lambda kw: {"x": kw["x"].double()}, TypeError, 'backend="reference"'),
        (lambda kw: {"x": None}, TypeError, "slim_tokens: x: allowed a tensor"),
        (lambda kw: {"norm_bias": kw["norm_bias"][1:]}, ValueError, "slim_tokens: norm_bias: allowed shape"),
        (lambda kw: {"w1": kw["w1"].half()}, TypeError, "slim_tokens: w1: allowed the dtype of x"),
        (lambda kw: {"w1": kw["w1"].T}, ValueError, "slim_tokens: w1: allowed shape"),
        (lambda kw: {"b1": kw["w1"]}, ValueError, "slim_tokens: b1: allowed shape"),
        (lambda kw: {"w2": kw["w2"][:, 1:]}, ValueError, "slim_tokens: w2: allowed shape"),
        (lambda kw: {"w2": kw["w2"][:0]}, ValueError, "slim_tokens: w1, w2: allowed at least one row"),
        (lambda kw: {"scale": kw["scale"][None]}, ValueError, "slim_tokens: scale: allowed 0 dimensions"),
        (lambda kw: {"scale": "1"}, TypeError, "slim_tokens: scale: allowed a number"),
        (lambda kw: {"eps": 0.0}, ValueError, "slim_tokens: eps: allowed a number above 0"),
    ],
    cost=_cost,
    length=_length,
    differentiable=("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "scale"),
    backward=_backward,
    setup_context=_setup_context,
    batch=("x",),
)
