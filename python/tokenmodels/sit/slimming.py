"""SiT's token slimming, and the way back from its slots to the patches they came from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenkernels as tk
from tokenmodels._refuse import refusal, require_number


class SlimTokens(nn.Module):
    """The token slimming module: N tokens in, M learned soft aggregates of them out.

    Each of the M slots is a softmax-weighted mean of the raw input tokens. N is free: another image
    size than in training gives each slot more or fewer tokens to choose from. M is not: a slot is a
    row of `fc2`.

    Source: Zong et al., ECCV 2022, section 3.1, equations 2 and 3. The bias of `fc2` is constant
    along the softmax: it has neither effect nor gradient, is frozen, and exists for the sake of the
    official checkpoints.

    Args:
        dim: channels C of a token.
        slots: tokens M out.
        hidden: channels of the projection; C // 2 if not given.

    Attributes:
        fused: True runs `tokenkernels.slim_tokens`, but plain PyTorch for tokens in float64 or on
            the meta device, which the kernels do not know; False always plain PyTorch, which is
            what other run-times than torch can be given.

    Example:
        >>> SlimTokens(384, 98)(torch.randn(2, 196, 384)).shape
        torch.Size([2, 98, 384])
    """

    def __init__(self, dim: int, slots: int, *, hidden: int | None = None) -> None:
        super().__init__()
        hidden = dim // 2 if hidden is None else hidden
        self.fused = True
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, slots)
        self.fc2.bias.requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) → (B, M, C)."""
        if not self.fused or tokens.dtype == torch.float64 or tokens.device.type == "meta":
            return self.assignment(tokens).to(tokens.dtype) @ tokens
        return tk.slim_tokens(
            tokens,
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.logit_scale,
            eps=self.norm.eps,
        )

    def assignment(self, tokens: Tensor) -> Tensor:
        """What each slot takes of each token: (B, N, C) → (B, M, N), every row sums to 1.

        In float32, or in float64 where the tokens are.
        """
        hidden = F.gelu(self.fc1(self.norm(tokens)))
        logits = self.logit_scale * F.linear(hidden, self.fc2.weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits.transpose(1, 2).to(wide).softmax(-1)

    @torch.no_grad()
    def spread(self, std: float) -> None:
        """Draws the slots anew, from a normal distribution, before training.

        A new `SiT` has 0.02 there, as the released models had: its slots begin as almost the same
        mean of all tokens, and take long to part. With 1 or more they differ from the start.

        Args:
            std: standard deviation of the slot projection's weights.

        Raises:
            ValueError: not above 0, or not finite.

        Example:
            >>> slim, tokens = SlimTokens(64, 4), torch.randn(1, 16, 64)
            >>> slim.spread(0.02)
            >>> slim.assignment(tokens).max() < 0.1
            tensor(True)
            >>> slim.spread(10.0)
            >>> slim.assignment(tokens).max() > 0.2
            tensor(True)
        """
        require_std("SlimTokens.spread", "std", std)
        nn.init.normal_(self.fc2.weight, std=std)

    @torch.no_grad()
    def fold(self) -> None:
        """Moves the logit scale into `fc2`, and drops its bias."""
        self.fc2.weight.mul_(self.logit_scale)
        self.fc2.register_parameter("bias", None)
        self.logit_scale.fill_(1.0)


def require_std(where: str, argument: str, value: float) -> None:
    """Raises unless `value` is a standard deviation above 0; see `require_number`."""
    require_number(where, argument, value, lambda x: 0 < x < math.inf, "above 0, finite")


def compose(assignments: Sequence[Tensor]) -> Tensor:
    """What each of the last slots took of each patch, through all slimmings.

    Args:
        assignments: one (B, M_i, N_i) per slimming, in order, N_1 the patches and N_i the M of the
            one before.

    Returns:
        (B, M, N) of the last slots and the patches; every row sums to 1.

    Raises:
        ValueError: there are none, or they do not follow each other.

    Example:
        >>> one, two = torch.rand(1, 6, 12).softmax(-1), torch.rand(1, 3, 6).softmax(-1)
        >>> compose([one, two]).sum(-1).round(decimals=4)
        tensor([[1., 1., 1.]])
    """
    if not assignments:
        raise ValueError(refusal("compose", "assignments", "one or more", "none"))
    whole = assignments[0]
    for one in assignments[1:]:
        if one.ndim != 3 or one.shape[-1] != whole.shape[1]:
            allowed = f"(B, M, {whole.shape[1]}) behind {tuple(whole.shape)}"
            raise ValueError(refusal("compose", "assignments", allowed, tuple(one.shape)))
        whole = one @ whole
    return whole


def unpool(slots: Tensor, assignments: Sequence[Tensor]) -> Tensor:
    """Gives the patches back what the slots have become.

    Every patch gets a weighted mean of the slots; a slot counts as much as it took of the patch,
    compared with what the other slots took of it. A patch that no slot took anything of is zero.

    Args:
        slots: (B, M, C), the patch tokens behind the last of the slimmings.
        assignments: as in `compose`.

    Returns:
        (B, N, C), a token per patch, row by row, in the dtype of `slots`.

    Raises:
        ValueError: the slots are not those of the last assignment.

    Example:
        >>> assignment = torch.rand(1, 3, 12).softmax(-1)
        >>> unpool(torch.ones(1, 3, 8), [assignment]).shape
        torch.Size([1, 12, 8])
    """
    taken = compose(assignments)
    if slots.ndim != 3 or slots.shape[:2] != taken.shape[:2]:
        allowed = f"({taken.shape[0]}, {taken.shape[1]}, C), as the assignments have it"
        raise ValueError(refusal("unpool", "slots", allowed, tuple(slots.shape)))
    total = taken.sum(1, keepdim=True)
    shares = taken / total.clamp_min(torch.finfo(taken.dtype).tiny)
    return (shares.transpose(1, 2) @ slots.to(shares.dtype)).to(slots.dtype)
