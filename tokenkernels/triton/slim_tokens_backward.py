"""slim_tokens_backward in Triton, in six launches.

The softmax comes again from `lse`, the hidden tokens from `projected`; what passes between launches
is in the dtype of x: hidden tokens and the projection's gradient (B, N, H), weights and the logits'
gradient (B, N, M). Of layer norm only three numbers per token are needed beside G = Σ dU·x̂ᵀ (dU the
gradient of the projection U = w1·(γx̂ + β) + b1):

    w1's gradient = γG + Σ dU·βᵀ, γ's = Σ_h w1·G, β's = w1ᵀ·Σ dU,
    Σ_c t = dU·(w1·γ), Σ_c t·x̂ = dU·(U − b1 − w1·β) for t = γ·(w1ᵀ·dU),

so the gradient of x is one product of matrices with these numbers at its end. Sums over the batch
are made in up to 16 splits of the tokens, which the last launch adds.
"""

import torch
from torch import Tensor
from torch.nn import functional

from tokenkernels.triton._launch import (
    Config,
    Entry,
    Table,
    aligned,
    blocks,
    capability,
    is_aligned,
    launch,
)
from tokenkernels.triton._slim import padded, wide
from tokenkernels.triton._slim_gradients import lower, resist, spread
from tokenkernels.triton._slim_parameters import collect, finish, fold


def _spread(slots: int, width: int, warps: int, registers: int | None = None) -> Config:
    return Config({"TOKENS": 64, "SLOTS": slots, "WIDTH": width}, warps, 3, registers)


FOLD = Table(
    [Entry(Config({"ROWS": 8, "WIDTH": 128}))],
    "8 rows of the weights per program: one short pass.",
)
SPREAD = Table(
    [
        Entry(_spread(32, 64, 4), width=32, bytes=(2,)),
        Entry(_spread(64, 64, 4), width=64, bytes=(2,), capability=90),
        Entry(_spread(128, 64, 8), bytes=(2,), capability=90),
        Entry(_spread(64, 32, 8, 168), bytes=(2,)),
        Entry(Config({"TOKENS": 64, "SLOTS": 32, "WIDTH": 32}, 4, 2)),
    ],
    "By slots: those of a block share the tokens of a tile; sm_80 has registers for half of it.",
)

LOWER = Table(
    [
        Entry(Config({"TILES": 4, "SLOTS": 64, "HIDDEN": 64}, 4, 3), bytes=(2,)),
        Entry(Config({"TILES": 4, "SLOTS": 32, "HIDDEN": 32}, 4, 2)),
    ],
    "64 hidden channels of a tile stay in registers while slots stream past.",
)
RESIST = Table(
    [
        Entry(Config({"TOKENS": 64, "CHANNELS": 128, "WIDTH": 64}, 8, 3), bytes=(2,)),
        Entry(Config({"TOKENS": 64, "CHANNELS": 32, "WIDTH": 32}, 4, 2)),
    ],
    "128 channels share the slopes of 64 tokens; float32 operands need smaller blocks.",
)
COLLECT = Table(
    [
        Entry(Config({"ROWS": 64, "LEFT": 64, "RIGHT": 128}, 8, 3), bytes=(2,), capability=90),
        Entry(Config({"ROWS": 32, "LEFT": 64, "RIGHT": 64}, 4, 3), bytes=(2,)),
        Entry(Config({"ROWS": 32, "LEFT": 32, "RIGHT": 64}, 4, 2)),
    ],
    "64 × 128 sums stay in registers while rows stream past.",
)
FINISH = Table(
    [Entry(Config({"SPLITS": 16, "HIDDEN": 16, "CHANNELS": 16, "NUMBERS": 256}))],
    "16 splits are read ahead; few numbers, so short programs.",
)

FEW = 16
SPLIT = 128
"""Tokens that are at least summed apart."""


class Scratch:
    """What passes between the launches: fresh memory."""

    def __init__(self, x: Tensor, slots: int, hidden: int, tiles: int) -> None:
        images, tokens, channels = x.shape
        self.rows, self.tiles = images * tokens, tiles
        self.width = padded(slots)
        self.weights, self.logits, self.hidden, self.projected = (
            torch.empty((self.rows, n), dtype=x.dtype, device=x.device)
            for n in (self.width, self.width, hidden, hidden)
        )
        self.statistics = wide(x, 4, self.rows)
        self.folded = wide(x, 2, hidden)
        self.sums = wide(x, 4, tiles, slots)
        self.scale = wide(x, tiles)
        block = COLLECT.choose(x.element_size(), channels, capability(x.device)).blocks["ROWS"]
        span = max(SPLIT, blocks(self.rows, 16))
        self.span = blocks(span, block) * block
        self.splits = max(1, blocks(self.rows, self.span))
        self.products = wide(x, self.splits, hidden, channels)
        self.totals = wide(x, self.splits, hidden)
        self.w2 = wide(x, self.splits, slots, hidden)


def slim_tokens_backward(
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
    """Gradients of x, both weights of the norm, w1, b1, w2, and the scale.

    Operands rounded to float16, or averaged over few slots, would be too far off: those are widened
    first.
    """
    (images, length, channels), (slots, hidden) = x.shape, w2.shape
    if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and slots < FEW):
        given = (x, norm_weight, norm_bias, w1, b1, w2)
        x, norm_weight, norm_bias, w1, b1, w2 = (t.float() for t in given)
        found = slim_tokens_backward(
            grad.float(), x, norm_weight, norm_bias, w1, b1, w2,
            scale_tensor, scale, eps, tokens.float(), lse, projected,
        )  # fmt: skip
        return *(g.to(t.dtype) for g, t in zip(found, given, strict=False)), found[-1]
    results = tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in (x, norm_weight, norm_bias, w1, b1, w2)
    )
    scale_grad = torch.empty((), dtype=torch.float32, device=x.device)
    if projected.ndim < 3:  # forward did not keep it
        norm = (norm_weight.float(), norm_bias.float())
        normal = functional.layer_norm(x.float(), (channels,), *norm, eps)
        projected = functional.linear(normal, w1.float(), b1.float())
    grad, x, w1, w2, tokens, projected = map(aligned, (grad, x, w1, w2, tokens, projected))
    gamma, beta, b1 = aligned(norm_weight), aligned(norm_bias), aligned(b1)
    lse = lse.contiguous()
    device, size = capability(x.device), x.element_size()
    whole = is_aligned(channels) and is_aligned(hidden)

    config = SPREAD.choose(size, slots, device)
    tile = config.blocks["TOKENS"]
    s = Scratch(x, slots, hidden, images * blocks(length, tile))
    launch(
        spread, (s.tiles * blocks(slots, config.blocks["SLOTS"]),),
        grad, tokens, x, projected, w2, lse, scale_tensor,
        s.weights, s.logits, s.hidden, s.statistics, s.sums,
        length, slots, scale, eps, s.rows, s.tiles * slots,
        channels, hidden, x.stride(0), x.stride(1),
        grad.stride(0), grad.stride(1), tokens.stride(0), tokens.stride(1), w2.stride(0), s.width,
        projected.stride(0), projected.stride(1), config=config, aligned=whole,
    )  # fmt: skip
    config = FOLD.choose(size, channels, device)
    launch(
        fold, (blocks(hidden, config.blocks["ROWS"]),),
        w1, b1, gamma, beta, s.folded, hidden, channels, w1.stride(0),
        config=config, aligned=whole,
    )  # fmt: skip
    config = LOWER.choose(size, hidden, device)
    launch(
        lower, (s.tiles,),
        s.logits, s.weights, s.sums, scale_tensor, projected, w2, s.folded,
        s.projected, s.statistics, s.scale,
        length, slots, scale, s.rows, s.tiles * slots, channels, hidden, w2.stride(0), s.width,
        projected.stride(0), projected.stride(1), config=config, aligned=whole, TOKENS=tile,
    )  # fmt: skip
    config = RESIST.choose(size, channels, device)
    tiles = blocks(length, config.blocks["TOKENS"]) * blocks(channels, config.blocks["CHANNELS"])
    launch(
        resist, (images * tiles,),
        s.weights, grad, s.projected, w1, x, gamma, s.statistics, results[0],
        length, slots, s.rows, channels, hidden, x.stride(0), x.stride(1),
        grad.stride(0), grad.stride(1), w1.stride(0), s.width, config=config, aligned=whole,
    )  # fmt: skip
    _parameters(s, x, w1, gamma, beta, (*results[1:], scale_grad), slots, whole)
    return *results, scale_grad


def _parameters(
    s: Scratch, x: Tensor, w1: Tensor, gamma: Tensor, beta: Tensor, results: tuple[Tensor, ...],
    slots: int, whole: bool,
) -> None:  # fmt: skip
    """The two launches that sum over the batch."""
    (_, length, channels), hidden = x.shape, w1.shape[0]
    device, size = capability(x.device), x.element_size()
    config = COLLECT.choose(size, channels, device)
    left, right = config.blocks["LEFT"], config.blocks["RIGHT"]
    first = blocks(hidden, left) * blocks(channels, right)
    second = blocks(slots, left) * blocks(hidden, right)
    launch(
        collect, ((first + second) * s.splits,),
        s.projected, x, s.logits, s.hidden, s.statistics, s.products, s.totals, s.w2,
        length, slots, s.rows, s.span, s.splits, channels, hidden, x.stride(0), x.stride(1),
        s.width, config=config, aligned=whole,
    )  # fmt: skip
    config = FINISH.choose(size, channels, device)
    across = blocks(channels, config.blocks["CHANNELS"])
    numbers = config.blocks["NUMBERS"]
    launch(
        finish, (across + blocks(slots * hidden, numbers) + blocks(hidden, numbers) + 1,),
        s.products, s.totals, s.w2, s.scale, w1, gamma, beta, *results,
        slots, s.splits, s.scale.numel(), channels, hidden, w1.stride(0),
        config=config, aligned=whole,
    )  # fmt: skip
