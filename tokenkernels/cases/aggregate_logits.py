"""The inputs that aggregate_logits is tried on, the calls it refuses, and what a call must cost."""

from __future__ import annotations

from typing import Any

import torch

from .._case import Bad, Case, Make


def _simple(batch: int, tokens: int, slots: int, channels: int) -> Any:
    def make(t: Make) -> dict[str, Any]:
        return {"logits": t.randn(batch, tokens, slots), "value": t.randn(batch, tokens, channels)}

    return make


def _masked(t: Make) -> dict[str, Any]:
    mask = t.bool(0.6, (3, 45))
    mask[1] = False
    logits, value = 4 * t.randn(3, 45, 35), t.randn(3, 45, 23)
    logits[0, ~mask[0]], value[2, ~mask[2]] = torch.nan, torch.nan
    logits[0, :, 3] = -torch.inf
    return {"logits": logits, "value": value, "mask": mask}


def _strided(t: Make) -> dict[str, Any]:
    both = t.randn(19, 2, 30).transpose(0, 1)
    return {"logits": both[:, :, :13], "value": both[:, :, 13:], "mask": t.bool(0.7, (19, 2)).T}


def _extreme(t: Make) -> dict[str, Any]:
    """Slots of one token alone, of all alike, of any; an image of one token."""
    logits = t.randn(2, 21, 6)
    logits[:, :, 0], logits[:, 3, 0] = -1e4, 1e4
    logits[:, :, 1], logits[:, 3, 1] = -1e4, 0
    logits[:, :, 2], logits[:, :, 3] = 0, 0.5
    mask = t.bool(1.0, (2, 21))
    mask[0, 1:] = False
    return {"logits": logits, "value": t.randn(2, 21, 7), "mask": mask}


def _backward_case(**needs: bool) -> Any:
    def make(t: Make) -> dict[str, Any]:
        mask, logits, value = t.bool(0.8, (2, 150)), 2 * t.randn(2, 150, 290), t.randn(2, 150, 21)
        scores = logits.float().masked_fill(~mask[..., None], -torch.inf)
        tokens = torch.softmax(scores, 1).mT @ value.float()
        return {
            "gradient": t.randn(2, 290, 21),
            "logits": logits,
            "value": value,
            "mask": mask,
            "tokens": tokens.to(t.dtype),
            "lse": torch.logsumexp(scores, 1),
        } | ({"need_logits": True, "need_value": True} | needs)

    return make


def cost(kwargs: dict[str, Any]) -> tuple[float, float]:
    """Both inputs read once, the slots written once; one product."""
    batch, tokens, slots = kwargs["logits"].shape
    channels = kwargs["value"].shape[2]
    moved = batch * (tokens * slots + tokens * channels + slots * channels)
    return kwargs["value"].element_size() * moved, 2 * batch * tokens * slots * channels


def length(kwargs: dict[str, Any]) -> float:
    """The longest sum, forward or backward."""
    return max(*kwargs["logits"].shape[1:], kwargs["value"].shape[2])


CASES = [
    Case("plain", _simple(3, 37, 13, 19)),
    Case("masked", _masked),
    Case("one-slot", _simple(2, 70, 1, 65)),
    Case("no-tokens", _simple(2, 0, 3, 5)),
    Case("blocks", _simple(2, 300, 40, 8)),
    Case("more-slots", _simple(1, 5, 300, 3)),
    Case("strided", _strided),
    Case("long", _simple(1, 1100, 5, 3)),
    Case("extreme", _extreme),
    Case("sit 16x196 m=128 c=768", _simple(16, 196, 128, 768), ("bench",)),
    Case("video 2x4096 m=256 c=768", _simple(2, 4096, 256, 768), ("bench",)),
    Case("resampler 4x576 m=64 c=1024", _simple(4, 576, 64, 1024), ("bench",)),
    Case("audio 1x16384 m=64 c=512", _simple(1, 16384, 64, 512), ("bench",)),
]

BACKWARD_CASES = [
    Case("both", _backward_case()),
    Case("logits-only", _backward_case(need_value=False)),
    Case("value-only", _backward_case(need_logits=False)),
]

BAD: list[Bad] = [
    (
        lambda kw: {"logits": kw["logits"].long()},
        TypeError,
        "aggregate_logits: logits: allowed a tensor of float32",
    ),
    (lambda kw: {"logits": kw["logits"][0]}, ValueError, "aggregate_logits: logits: allowed 3"),
    (lambda kw: {"value": kw["value"][0]}, ValueError, "aggregate_logits: value: allowed shape"),
    (lambda kw: {"value": kw["value"][:, 1:]}, ValueError, "aggregate_logits: value: allowed"),
    (lambda kw: {"value": kw["value"][1:]}, ValueError, "aggregate_logits: value: allowed shape"),
    (
        lambda kw: {"value": kw["value"].half()},
        TypeError,
        "aggregate_logits: value: allowed the dtype of logits",
    ),
    (lambda kw: {"logits": kw["logits"].double()}, TypeError, 'backend="reference"'),
    (
        lambda kw: {"mask": torch.zeros(3, 37)},
        TypeError,
        "aggregate_logits: mask: allowed a tensor of bool",
    ),
    (
        lambda kw: {"mask": torch.zeros(3, 36, dtype=torch.bool)},
        ValueError,
        "aggregate_logits: mask: allowed shape",
    ),
]
