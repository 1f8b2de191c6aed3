"""A slimmed vision transformer with the dense one that it learns from: images in, losses out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenmodels._blocks import initialise
from tokenmodels._refuse import refusal
from tokenmodels.sit.distillation import FRDLosses, frd_losses
from tokenmodels.sit.hosts import find, keep_tokens
from tokenmodels.sit.recovery import RecoverTokens
from tokenmodels.sit.slim import Slimming


class DistilledViT(nn.Module):
    """What `Distilled` is for a SiT, for a model that `slim` slimmed: feature recalibration
    distillation, block by block, from a copy that is not slimmed.

    It holds, for training alone, what recovers every patch from the slots. The teacher is always in
    eval mode, and no gradient reaches it.

    Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, section 3.2.

    Args:
        student: a slimmed classifier, images to logits.
        teacher: one of the same width, depth and patches, not slimmed.
        lambda_token: see `frd_losses`, as for the others.
        lambda_logits: see there.
        temperature: see there.

    Attributes:
        recover: block index, as a string, → its `RecoverTokens`.

    Raises:
        ValueError: a student that is not slimmed, a teacher that is, or one of another shape.
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
        slimming = getattr(ours.model, "slimming", None)
        if not isinstance(slimming, Slimming):
            raise ValueError(refusal("DistilledViT", "student", "a slimmed one", "one that is not"))
        if hasattr(theirs.model, "slimming"):
            raise ValueError(refusal("DistilledViT", "teacher", "one not slimmed", "a slimmed one"))
        for name in ("dim", "prefix", "image_size"):
            if (own := getattr(ours, name)) != (other := getattr(theirs, name)):
                allowed = f"one with {name}={own}, as the student"
                raise ValueError(refusal("DistilledViT", "teacher", allowed, other))
        if len(ours.blocks) != len(theirs.blocks):
            allowed = f"one of {len(ours.blocks)} blocks, as the student"
            raise ValueError(refusal("DistilledViT", "teacher", allowed, len(theirs.blocks)))
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.recover = nn.ModuleDict(
            {
                str(block): RecoverTokens(ours.dim, tokens, slimming.patches)
                for block, tokens in enumerate(slimming.tokens_after)
                if tokens < slimming.patches
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
        """
        ours, theirs = self._hosts
        with keep_tokens(ours) as tokens:
            logits = _logits(self.student(images))
        with torch.no_grad(), keep_tokens(theirs) as wanted:
            teacher_logits = _logits(self.teacher(images))
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


def _logits(output: Any) -> Tensor:
    """Those in what a classifier of timm or transformers gives."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        allowed = "models that give logits"
        raise TypeError(refusal("DistilledViT", "output", allowed, type(output).__name__))
    return logits
