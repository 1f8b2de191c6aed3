"""The inputs that slim_tokens is tried on, the calls it refuses, and what a call must cost."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Bad, Case, Make, close


def _shapes(
    batch: int, tokens: int, channels: int, slots: int, hidden: int | None = None, **options: Any
) -> Any:
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


def _constant(t: Make) -> dict[str, Any]:
    """An image of tokens with equal channels, whose variance is 0; every dtype has their values."""
    kwargs = _shapes(2, 35, 24, 6)(t)
    values = torch.arange(35, dtype=t.dtype, device=t.device)[:, None] % 9 - 4
    kwargs["x"][1] = values / 4
    return kwargs


def _one_hot(t: Make) -> dict[str, Any]:
    """Three slots have logits of about ±10⁴, nearly all of whose weights are 0 or 1."""
    kwargs = _shapes(2, 7, 24, 6)(t)
    kwargs["w2"][3:] *= 2048
    return kwargs


def _gradient(forward: Any, keep: bool = True) -> Any:
    """The gradient of a call, with what the forward leaves for it; `scale` as the schema has it."""

    def make(t: Make) -> dict[str, Any]:
        k = forward(t)
        x, g, b, w1, b1, w2 = (v.double() for v in list(k.values())[:6])
        projected = F.linear(F.layer_norm(x, x.shape[-1:], g, b), w1, b1)
        logits = k["scale"] * F.linear(F.gelu(projected), w2)
        tokens = logits.softmax(1).transpose(1, 2) @ x
        scale = k.pop("scale")
        learned = isinstance(scale, Tensor)
        return {
            "grad": t.randn(*tokens.shape),
            **k,
            "scale_tensor": scale if learned else None,
            "scale": 1.0 if learned else scale,
            "eps": 1e-5,
            "tokens": tokens.to(t.dtype),
            "lse": logits.logsumexp(1).float(),
            "projected": projected.float() if keep else torch.empty(0, device=t.device),
        }

    return make


def cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    x = kwargs["x"]
    slots, hidden = kwargs["w2"].shape
    batch, tokens, channels = x.shape
    numbers = batch * (tokens + slots) * channels + hidden * (channels + slots)
    macs = batch * tokens * (channels * hidden + hidden * slots + slots * channels)
    return numbers * x.element_size(), 2 * macs


def length(kwargs: dict[str, Any]) -> int:
    """The sums of layer norm, projection, logits and aggregation."""
    (_, tokens, channels), (_, hidden) = kwargs["x"].shape, kwargs["w2"].shape
    return tokens + 2 * channels + hidden


def _widened(kwargs: dict[str, Any]) -> bool:
    """Whether backward reads float32 copies: what float16, or few slots, would round too much."""
    dtype = kwargs["x"].dtype
    return dtype == torch.float16 or (dtype == torch.bfloat16 and kwargs["w2"].shape[0] < 16)


def launches(kwargs: dict[str, Any]) -> tuple[int, int]:
    """Two; backward six, and 14 where what it reads is widened and its results narrowed again."""
    return 2, 6 + 14 * _widened(kwargs)


def backward_launches(kwargs: dict[str, Any]) -> tuple[int, int]:
    """The same six and 14; where forward kept no projection, a norm, a product and their casts."""
    again = kwargs["projected"].ndim < 3
    casts = 5 * (kwargs["x"].dtype == torch.bfloat16 and not _widened(kwargs))
    return 6 + 14 * _widened(kwargs) + again * (2 + casts), 0


def gradient_length(kwargs: dict[str, Any]) -> int:
    """The longest is the scale's, over slots and hidden channels, and it nearly cancels."""
    slots, hidden = kwargs["w2"].shape
    return 4 * (length(kwargs) + slots * hidden)


def formula(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale: Any,
    eps: float = 1e-5,
) -> Tensor:
    """The official module, in the dtype of x throughout."""
    normal = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    logits = scale * F.linear(F.gelu(F.linear(normal, w1, b1)), w2)
    return torch.bmm(logits.softmax(1).transpose(1, 2), x)


def compare_gradients(
    got: list[Tensor], want: list[Tensor], low: list[Tensor], kwargs: dict[str, Any]
) -> None:
    """Likewise; the gradient of the scale nearly cancels: its bound is on the products in it, which
    are rounded once, and 8 eps of float32 for the functions they come from.
    """
    products, rough = _gradients_of_formula(*list(kwargs.values())[:10])
    low = rough if got[0].dtype == torch.bfloat16 else low[:6]
    close(got[:6], want[:6], low, gradient_length(kwargs))
    error = (got[6] - want[6]).abs().item()
    eps = torch.finfo(got[0].dtype).eps + 8 * torch.finfo(torch.float32).eps
    bound = eps * products.double().abs().sum().item()
    assert error <= bound, f"gradient of the scale: error {error:.3g}, bound {bound:.3g}"


def _gradients_of_formula(grad: Tensor, *inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """What the gradient of the scale adds up, and those of all tensors, in their own dtype."""
    *tensors, learned, scale, eps = inputs
    x, g, b, w1, b1, w2 = tensors = [v.detach().clone().requires_grad_() for v in tensors]
    raw = F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], g, b, eps), w1, b1)), w2)
    logits = (scale if learned is None else learned.to(x.dtype)) * raw
    out = torch.bmm(logits.softmax(1).transpose(1, 2), x)
    of_logits, *found = torch.autograd.grad(out, [logits, *tensors], grad)
    return (of_logits * raw).detach(), found


EXACT = (torch.float32, torch.float16)
"""Of one mean of bfloat16 it is chance how far the formula is off, and it the bound."""

CASES = [
    Case("small", _shapes(2, 37, 48, 11)),
    Case("odd", _shapes(3, 23, 21, 5, hidden=9, scale=0.7)),
    Case("one-token", _shapes(2, 1, 20, 3)),
    Case("more-slots", _shapes(2, 6, 17, 19, hidden=33)),
    Case("negative-scale", _shapes(1, 40, 32, 4, scale=-2.0, eps=1e-3)),
    Case("patches", _patches),
    Case("far", _far, ("test", "no-opcheck")),
    Case("constant", _constant, ("test", "no-opcheck")),
    Case("one-hot", _one_hot, ("test", "no-opcheck")),
    Case("one-slot", _shapes(2, 33, 17, 1), ("test", "no-opcheck"), EXACT),
    Case("tiles", _shapes(2, 300, 18, 17)),
    Case("wide-hidden", _shapes(1, 34, 9, 66, hidden=601), ("test", "no-opcheck")),
    Case("scale-eps", _shapes(2, 9, 12, 3, eps=0.5)),
    Case("sit-s stage 1 16x196x384 M=98", _shapes(16, 196, 384, 98), ("bench",)),
    Case("sit-s stage 2 16x98x384 M=49", _shapes(16, 98, 384, 49), ("bench",)),
    Case("sit-s stage 3 16x49x384 M=24", _shapes(16, 49, 384, 24), ("bench",)),
]

BACKWARD_CASES = [
    Case("scale-tensor", _gradient(_shapes(2, 37, 48, 11))),
    Case("scale-number", _gradient(_shapes(3, 23, 21, 5, hidden=9, scale=-0.7))),
    Case("two-tokens", _gradient(_shapes(2, 2, 20, 3))),
    Case("one-slot", _gradient(_shapes(2, 30, 17, 1))),
    Case("projected-again", _gradient(_patches, keep=False)),
    Case("segments", _gradient(_shapes(1, 300, 18, 17))),
    Case("far", _gradient(_far)),
    Case("constant", _gradient(_constant)),
    Case("sharp", _gradient(_shapes(2, 40, 24, 17, scale=6.0))),
    Case("wide-hidden", _gradient(_shapes(1, 34, 9, 66, hidden=201))),
]

BAD: list[Bad] = [
    (lambda kw: {"x": kw["x"][0]}, ValueError, "slim_tokens: x: allowed 3 dimensions"),
    (lambda kw: {"x": kw["x"][:, :0]}, ValueError, "slim_tokens: x: allowed at least one token"),
    (
        lambda kw: {"x": kw["x"][..., :-1]},
        ValueError,
        "slim_tokens: norm_weight: allowed shape \\(47\\)",
    ),
    (lambda kw: {"x": kw["x"].long()}, TypeError, "slim_tokens: x: allowed a tensor of float32"),
    (lambda kw: {"x": kw["x"].double()}, TypeError, 'backend="reference"'),
    (lambda kw: {"x": None}, TypeError, "slim_tokens: x: allowed a tensor"),
    (
        lambda kw: {"norm_bias": kw["norm_bias"][1:]},
        ValueError,
        "slim_tokens: norm_bias: allowed shape",
    ),
    (lambda kw: {"w1": kw["w1"].half()}, TypeError, "slim_tokens: w1: allowed the dtype of x"),
    (lambda kw: {"w1": kw["w1"].T}, ValueError, "slim_tokens: w1: allowed shape"),
    (lambda kw: {"b1": kw["w1"]}, ValueError, "slim_tokens: b1: allowed shape"),
    (lambda kw: {"w2": kw["w2"][:, 1:]}, ValueError, "slim_tokens: w2: allowed shape"),
    (lambda kw: {"w2": kw["w2"][:0]}, ValueError, "slim_tokens: w1, w2: allowed at least one row"),
    (
        lambda kw: {"scale": kw["scale"][None]},
        ValueError,
        "slim_tokens: scale: allowed 0 dimensions",
    ),
    (lambda kw: {"scale": "1"}, TypeError, "slim_tokens: scale: allowed a number"),
    (lambda kw: {"eps": 0.0}, ValueError, "slim_tokens: eps: allowed a number above 0"),
]
