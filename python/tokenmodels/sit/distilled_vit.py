"""A slimmed vision transformer with the dense one that it learns from: images in, losses out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tokenmodels._blocks import initialise
from tokenmodels._refuse import refusal, require_number
from tokenmodels.sit.distillation import FRDLosses, frd_losses
from tokenmodels.sit.hosts import Host, find, keep_tokens
from tokenmodels.sit.recovery import RecoverTokens
from tokenmodels.sit.slim import NAME, Slimming


class DistilledViT(nn.Module):
    """What `Distilled` is for a SiT, for a model that `slim` slimmed: feature recalibration
    distillation, block by block, from a copy that is not slimmed.

    It holds, for training alone, what recovers every patch from the slots. The teacher is always in
    eval mode, and no gradient reaches it. Both are parts of it, so `state_dict()` has the teacher's
    weights too; what to keep is the student's.

    Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, section 3.2.

    Args:
        student: a slimmed classifier, images to logits.
        teacher: one of the same width, depth, patches and classes, not slimmed.
        lambda_token: see `frd_losses`, as for the others.
        lambda_logits: see there.
        temperature: see there.

    Attributes:
        recover: block index, as a string, → its `RecoverTokens`, from the first slimming on.

    Raises:
        ValueError: a student that is not slimmed, a teacher that is, or one of another shape;
            weights below 0, a temperature that is not above it.
        TypeError: see `slim`.

    Example:
        >>> import copy, timm
        >>> teacher = timm.create_model("deit_tiny_patch16_224", depth=4, num_classes=5)
        >>> student = copy.deepcopy(teacher)
        >>> slimming = slim(student)
        >>> distilled = DistilledViT(student, teacher)
        >>> losses = distilled(torch.randn(2, 3, 224, 224), torch.tensor([0, 3]))
        >>> losses.total.backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        lambda_token: float = 2.0,
        lambda_logits: float = 2.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        ours, theirs = find("DistilledViT", student), find("DistilledViT", teacher)
        slimming = _slimming(ours)
        if hasattr(theirs.model, NAME):
            raise ValueError(refusal("DistilledViT", "teacher", "one not slimmed", "a slimmed one"))
        for name in ("dim", "prefix", "image_size"):
            if (own := getattr(ours, name)) != (other := getattr(theirs, name)):
                allowed = f"one with {name}={own}, as the student"
                raise ValueError(refusal("DistilledViT", "teacher", allowed, other))
        if len(ours.blocks) != len(theirs.blocks):
            allowed = f"one of {len(ours.blocks)} blocks, as the student"
            raise ValueError(refusal("DistilledViT", "teacher", allowed, len(theirs.blocks)))
        for name, value in (("lambda_token", lambda_token), ("lambda_logits", lambda_logits)):
            require_number("DistilledViT", name, value, lambda x: 0 <= x < math.inf, "0 or above")
        require_number(
            "DistilledViT", "temperature", temperature, lambda x: 0 < x < math.inf, "above 0"
        )
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.recover = nn.ModuleDict(
            {
                str(block): RecoverTokens(ours.dim, tokens, slimming.patches)
                for block, tokens in enumerate(slimming.tokens_after)
                if block >= min(slimming.slots)
            }
        )
        initialise(self.recover)
        self.recover.to(next(slimming.parameters()))
        self._hosts = (ours, theirs)
        self.lambda_token, self.lambda_logits = lambda_token, lambda_logits
        self.temperature = temperature
        self.train(student.training)

    def train(self, mode: bool = True) -> DistilledViT:
        """Sets the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor) -> FRDLosses:
        """Losses of a batch.

        Args:
            images: (B, channels, height, width), of the size from which the slots were counted.
            targets: (B, classes) of probabilities, or (B) labels.

        Raises:
            ValueError: a student whose slimmings were removed, or whose activations are recomputed
                in a way that gives its tokens no gradient; a teacher of other classes.
        """
        ours, theirs = self._hosts
        slimming = _slimming(ours)
        with keep_tokens(ours) as tokens:
            logits = _logits(self.student(images))
        with torch.no_grad(), keep_tokens(theirs) as wanted:
            teacher_logits = _logits(self.teacher(images))
        if logits.shape != teacher_logits.shape:
            allowed = f"one that gives {tuple(logits.shape)} logits, as the student"
            raise ValueError(
                refusal("DistilledViT", "teacher", allowed, tuple(teacher_logits.shape))
            )
        # A slimming lies before the last tokens, whatever else is frozen. Where nothing leads back
        # from them, they say none the less that they require gradients.
        learns = any(value.requires_grad for value in slimming.parameters())
        if torch.is_grad_enabled() and learns and tokens[-1].grad_fn is None:
            allowed = "one that recomputes activations with use_reentrant=False, or not at all"
            raise ValueError(
                refusal("DistilledViT", "student", allowed, "tokens without gradients")
            )
        recovered = [
            self.recover[str(block)](one) if str(block) in self.recover else one
            for block, one in enumerate(tokens)
        ]
        return frd_losses(
            logits,
            recovered,
            teacher_logits,
            wanted,
            targets,
            lambda_token=self.lambda_token,
            lambda_logits=self.lambda_logits,
            temperature=self.temperature,
        )


def _slimming(host: Host) -> Slimming:
    slimming = getattr(host.model, NAME, None)
    if not isinstance(slimming, Slimming):
        raise ValueError(refusal("DistilledViT", "student", "a slimmed one", "one that is not"))
    return slimming


def _logits(output: Any) -> Tensor:
    """Those in what a classifier of timm or transformers gives."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        allowed = "models that give logits"
        raise TypeError(refusal("DistilledViT", "output", allowed, type(output).__name__))
    return logits
