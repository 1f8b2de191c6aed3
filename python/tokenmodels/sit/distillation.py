"""Feature recalibration distillation: what a SiT student is trained by, beside the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmodels._refuse import refusal


class FRDLosses(NamedTuple):
    """The loss and what it is the sum of; every one a tensor without dimensions, weighted."""

    total: Tensor
    cls: Tensor
    token: Tensor
    logits: Tensor
    cnn: Tensor


def frd_losses(
    logits: Tensor,
    tokens: Sequence[Tensor],
    teacher_logits: Tensor,
    teacher_tokens: Sequence[Tensor],
    targets: Tensor,
    *,
    lambda_token: float = 2.0,
    lambda_logits: float = 2.0,
    temperature: float = 1.0,
    dist_logits: Tensor | None = None,
    cnn_logits: Tensor | None = None,
    lambda_cnn: float = 1.0,
) -> FRDLosses:
    """Cross entropy with the targets; recovered tokens and logits against those of the teacher;
    with a distillation token, cross entropy with the labels of a convolutional teacher.

    In float32, whatever the networks compute in; float64 stays. No gradient reaches the teacher.

    Args:
        logits: (B, classes), of the student.
        tokens: per block (B, R, C), the student's recovered patch tokens (`TrainingParts`), those
            of blocks before the first slimming as they are.
        teacher_logits: (B, classes).
        teacher_tokens: per block (B, R, C), the dense teacher's patch tokens.
        targets: (B, classes) of probabilities, as mixing and smoothing give them, or (B) labels.
        lambda_token: weight of the tokens' mean squared error, which is averaged over all blocks.
        lambda_logits: weight of the Kullback-Leibler divergence from the teacher's classes.
        temperature: by which both logits are divided there; its square multiplies the term.
        dist_logits: (B, classes), of the student's distillation token.
        cnn_logits: (B, classes), of the convolutional teacher; the largest is the label.
        lambda_cnn: weight of the cross entropy between the two.

    Raises:
        ValueError: not as many tokens as the teacher has, or of another shape; only one of
            `dist_logits` and `cnn_logits`.

    Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, section 3.2.

    Example:
        >>> logits, tokens = torch.zeros(2, 10), [torch.zeros(2, 4, 8)]
        >>> frd_losses(logits, tokens, logits, [torch.ones(2, 4, 8)], torch.tensor([1, 2])).token
        tensor(2.)
    """
    if (dist_logits is None) != (cnn_logits is None):
        given = "cnn_logits" if dist_logits is None else "dist_logits"
        allowed = "both or neither"
        raise ValueError(refusal("frd_losses", "dist_logits, cnn_logits", allowed, f"only {given}"))
    if len(tokens) != len(teacher_tokens):
        allowed = f"those of {len(teacher_tokens)} blocks, as the teacher's"
        raise ValueError(refusal("frd_losses", "tokens", allowed, len(tokens)))
    for block, (one, other) in enumerate(zip(tokens, teacher_tokens, strict=True)):
        if one.shape != other.shape:
            allowed = f"{tuple(other.shape)} behind block {block}, as the teacher's"
            raise ValueError(refusal("frd_losses", "tokens", allowed, tuple(one.shape)))
    logits, teacher_logits = _wide(logits), _wide(teacher_logits.detach())
    labels = targets if not targets.is_floating_point() else targets.to(logits.dtype)
    cls = F.cross_entropy(logits, labels)
    errors = [
        F.mse_loss(_wide(one), _wide(other.detach()))
        for one, other in zip(tokens, teacher_tokens, strict=True)
    ]
    token = lambda_token * torch.stack(errors).mean()
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, -1),
        F.log_softmax(teacher_logits / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    soft = lambda_logits * temperature**2 * divergence
    hard = torch.zeros_like(cls)
    if dist_logits is not None and cnn_logits is not None:
        hard = lambda_cnn * F.cross_entropy(_wide(dist_logits), cnn_logits.argmax(-1))
    return FRDLosses(cls + token + soft + hard, cls, token, soft, hard)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
