"""The inputs that aggregate_soft is tried on, the calls it refuses, and what a call must cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._case import Bad, Case, Make


def _simple(
    batch: int, tokens: int, slots: int, features: int, channels: int, **options: Any
) -> Any:
    def make(t: Make) -> dict[str, Any]:
        query, key = t.randn(slots, features) / features**0.5, t.randn(batch, tokens, features)
        return {"query": query, "key": key, "value": t.randn(batch, tokens, channels)} | options

    return make


def _everything(t: Make) -> dict[str, Any]:
    mask = t.bool(0.7, (3, 41))
    mask[1] = False
    key, value = t.randn(3, 41, 20), t.randn(3, 41, 37)
    key[0, ~mask[0]], value[2, ~mask[2]] = torch.nan, torch.nan
    return {
        "query": t.randn(3, 18, 20),
        "key": key,
        "value": value,
        "bias": t.randn(3, 41),
        "mask": mask,
        "scale": t.randn(1)[0] * 0.2,
        "return_weights": True,
    }


def _key_is_value(t: Make) -> dict[str, Any]:
    x = t.randn(2, 33, 24)
    return {"query": t.randn(50, 24), "key": x, "value": x[:], "scale": 24**-0.5}


def _own_query(t: Make) -> dict[str, Any]:
    """A query per image, keys that are the values, biases, no mask."""
    x = t.randn(2, 26, 24)
    return {
        "query": t.randn(2, 9, 24),
        "key": x,
        "value": x[:],
        "bias": t.randn(2, 26),
        "scale": 0.3,
    }


def _mask_and_weights(t: Make) -> dict[str, Any]:
    mask = t.bool(0.5, (2, 31))
    return _simple(2, 31, 6, 8, 11, mask=mask, scale=-0.4, return_weights=True)(t)


def _scale_tensor(t: Make) -> dict[str, Any]:
    return {
        "query": t.randn(5, 9),
        "key": t.randn(3, 14, 9),
        "value": t.randn(3, 14, 3),
        "scale": t.randn(1)[0].abs() / 3,
    }


def _infinite(t: Make) -> dict[str, Any]:
    bias = t.randn(2, 300, dtype=torch.float32)
    bias[0, 40:] = -torch.inf
    bias[1] = -torch.inf
    return {
        "query": t.randn(4, 6),
        "key": t.randn(2, 300, 6),
        "value": t.randn(2, 300, 5),
        "bias": bias,
    }


def _peaky(t: Make) -> dict[str, Any]:
    return {
        "query": t.randn(40, 16),
        "key": 8 * t.randn(2, 530, 16),
        "value": t.randn(2, 530, 8),
        "return_weights": True,
    }


def _extreme(t: Make) -> dict[str, Any]:
    """Scores of ±1e4, each of one product; of the first slot one token alone, of the last all
    alike; an image of one token.
    """
    key = 100 * t.randn(2, 21, 5).sign()
    key[:, :, 0] = -100
    key[:, 3, 0] = 100
    query = 100 * torch.eye(6, 5, dtype=key.dtype, device=key.device)
    mask = t.bool(1.0, (2, 21))
    mask[0, 1:] = False
    return {"query": query, "key": key, "value": t.randn(2, 21, 7), "mask": mask}


def _strided(t: Make) -> dict[str, Any]:
    both = t.randn(19, 2, 2, 16).transpose(0, 1)
    return {
        "query": t.randn(7, 16),
        "key": both[:, :, 0],
        "value": both[:, :, 1],
        "mask": t.bool(0.6, (19, 2)).T,
    }


def _bench(batch: int, tokens: int, slots: int, width: int) -> Any:
    def make(t: Make) -> dict[str, Any]:
        query = t.randn(slots, width) / width**0.5
        return {
            "query": query,
            "key": t.randn(batch, tokens, width),
            "value": t.randn(batch, tokens, width),
        }

    return make


def _sizes(kwargs: dict[str, Any]) -> tuple[int, int, int, int, int]:
    batch, tokens, features = kwargs["key"].shape
    return batch, tokens, kwargs["query"].shape[-2], features, kwargs["value"].shape[2]


def cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    """Inputs read once, slots (and weights that are asked for) written once; two products."""
    batch, tokens, slots, features, channels = _sizes(kwargs)
    size = kwargs["value"].element_size()
    read = kwargs["query"].numel() + batch * tokens * (
        channels + features * (kwargs["key"] is not kwargs["value"])
    )
    kept = 4 * batch * slots * tokens * bool(kwargs.get("return_weights"))
    return size * (read + batch * slots * channels) + kept, 2 * batch * tokens * slots * (
        features + channels
    )


def length(kwargs: dict[str, Any]) -> float:
    """The longest sum: what the scale gets, where it is learned, sums over everything."""
    batch, tokens, slots, features, channels = _sizes(kwargs)
    if kwargs.get("need_scale", isinstance(kwargs.get("scale"), Tensor)):
        return batch * tokens * slots * features
    return max(tokens, slots, features, channels)


def launches(kwargs: dict[str, Any]) -> tuple[int, int]:
    """One where a block holds all tokens, two where they are split; backward three."""
    tokens, half = kwargs["key"].shape[1], kwargs["key"].dtype != torch.float32
    return 1 if tokens <= (128 if half else 64) else 2, 3


CASES = [
    Case("shared", _simple(3, 37, 13, 16, 19)),
    Case("everything", _everything, ("test", "coupled")),
    Case("key-is-value", _key_is_value),
    Case("own-query-bias", _own_query, ("test", "coupled")),
    Case("mask-weights", _mask_and_weights),
    Case("scale-tensor", _scale_tensor),
    Case("infinite-bias", _infinite),
    Case("peaky-blocks", _peaky),
    Case("extreme", _extreme),
    Case("one-slot", _simple(2, 70, 1, 33, 65)),
    Case("two-tokens", _simple(2, 2, 6, 4, 4)),
    Case("no-tokens", _simple(2, 0, 3, 4, 5)),
    Case("more-slots", _simple(1, 5, 300, 7, 3)),
    Case("wide", _simple(1, 20, 33, 260, 300)),
    Case("strided", _strided),
    Case("sit 16x196 m=128 c=768", _bench(16, 196, 128, 768), ("bench",)),
    Case("video 2x4096 m=256 c=768", _bench(2, 4096, 256, 768), ("bench",)),
    Case("resampler 4x576 m=64 c=1024", _bench(4, 576, 64, 1024), ("bench",)),
    Case("audio 1x16384 m=64 c=512", _bench(1, 16384, 64, 512), ("bench",)),
]


def _backward_case(kept: bool = True, **needs: bool) -> Any:
    def make(t: Make) -> dict[str, Any]:
        mask = t.bool(0.8, (2, 290))
        key, value = t.randn(2, 290, 10), t.randn(2, 290, 21)
        bias, scale = t.randn(2, 290, dtype=torch.float32), t.randn(1, dtype=torch.float32)[0]
        query = t.randn(2, 17, 10)
        scores = scale * (key.float() @ query.float().mT) + bias[..., None]
        scores = scores.masked_fill(~mask[..., None], -torch.inf)
        weights, lse = torch.softmax(scores, 1), torch.logsumexp(scores, 1)
        tokens = weights.mT @ value.float()
        return (
            {
                "gradient": t.randn(2, 17, 21),
                "query": query,
                "key": key,
                "value": value,
                "bias": bias,
                "mask": mask,
                "scale_tensor": scale,
                "scale": 1.0,
                "tokens": tokens.to(t.dtype),
                "lse": lse,
                "weights": weights if kept else None,
            }
            | {"need_query": True, "need_key": True, "need_value": True, "need_scale": True}
            | needs
        )

    return make


BACKWARD_CASES = [
    Case("kept", _backward_case(need_scale=False)),
    Case("made-again", _backward_case(kept=False)),
    Case("values-only", _backward_case(need_query=False, need_key=False, need_scale=False)),
    Case("query-only", _backward_case(need_key=False, need_value=False, need_scale=False)),
    Case("scale-only", _backward_case(need_query=False, need_key=False, need_value=False)),
]

BAD: list[Bad] = [
    (
        lambda kw: {"query": kw["query"].long()},
        TypeError,
        "aggregate_soft: query: allowed a tensor of float32",
    ),
    (
        lambda kw: {"query": kw["query"][0]},
        ValueError,
        "aggregate_soft: query: allowed 2 or 3 dimensions",
    ),
    (
        lambda kw: {"query": kw["query"][:, 1:]},
        ValueError,
        r"aggregate_soft: query: allowed shape \(\*, 16\)",
    ),
    (
        lambda kw: {"query": kw["query"].expand(2, -1, -1)},
        ValueError,
        "aggregate_soft: query: allowed shape",
    ),
    (lambda kw: {"key": kw["key"][0]}, ValueError, "aggregate_soft: key: allowed 3 dimensions"),
    (
        lambda kw: {"key": kw["key"].bfloat16()},
        TypeError,
        "aggregate_soft: key: allowed the dtype of query",
    ),
    (lambda kw: {"value": kw["value"][:, 1:]}, ValueError, "aggregate_soft: value: allowed shape"),
    (
        lambda kw: {"value": kw["value"].double()},
        TypeError,
        'backend="reference"|the dtype of query',
    ),
    (
        lambda kw: {"scale": torch.ones(1)},
        ValueError,
        "aggregate_soft: scale: allowed a number or a tensor of 0",
    ),
    (lambda kw: {"scale": "1"}, TypeError, "aggregate_soft: scale: allowed a number"),
    (
        lambda kw: {"scale": torch.tensor(1)},
        TypeError,
        "aggregate_soft: scale: allowed a tensor of float32",
    ),
    (lambda kw: {"bias": torch.zeros(3, 1)}, ValueError, "aggregate_soft: bias: allowed shape"),
    (
        lambda kw: {"mask": torch.zeros(3, 37)},
        TypeError,
        "aggregate_soft: mask: allowed a tensor of bool",
    ),
    (
        lambda kw: {"return_weights": 1},
        TypeError,
        "aggregate_soft: return_weights: allowed True, False",
    ),
]
