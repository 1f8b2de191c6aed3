"""A SiT with all that it learns from, as one module: images and targets in, losses out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmodels._refuse import refusal
from tokenmodels.sit.distillation import FRDLosses, frd_losses
from tokenmodels.sit.model import SiT


class Distilled(nn.Module):
    """A student and its teachers, which see the same images; the student alone is trained.

    One forward gives the losses, so that whatever wraps a module (`DistributedDataParallel`,
    `torch.compile`) sees every parameter that is trained used in it. The teachers are always in
    eval mode, and no gradient reaches them. Without teachers the labels are all there is to learn
    from, which is how teachers are trained.

    Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, section 3.2; the
    convolutional teacher is that of Touvron et al., "Training data-efficient image transformers &
    distillation through attention", ICML 2021.

    Args:
        student: with training parts where it has a teacher, unless it is dense.
        teacher: a dense SiT of the student's width and depth.
        cnn_teacher: any classifier, images to logits, whose labels `student.config.dist_token`
            learns.
        lambda_token: see `frd_losses`, as for the others.
        lambda_logits: see there.
        lambda_cnn: see there.
        temperature: see there.

    Raises:
        ValueError: teachers and a student that do not belong together.

    Example:
        >>> shape = dict(embed_dim=48, depth=2, num_heads=3, image_size=64, num_classes=5)
        >>> student = SiT(SiTConfig(**shape, stages=(1, 1)), training_parts=True)
        >>> distilled = Distilled(student, SiT(SiTConfig(**shape, dense=True)))
        >>> losses = distilled(torch.randn(2, 3, 64, 64), torch.tensor([0, 3]))
        >>> losses.total.backward()
    """

    def __init__(
        self,
        student: SiT,
        teacher: SiT | None = None,
        *,
        cnn_teacher: nn.Module | None = None,
        lambda_token: float = 2.0,
        lambda_logits: float = 2.0,
        lambda_cnn: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        _require_pair(student, teacher, cnn_teacher)
        self.student = student
        self.teacher = teacher
        self.cnn_teacher = cnn_teacher
        self.weights = {
            "lambda_token": lambda_token,
            "lambda_logits": lambda_logits,
            "lambda_cnn": lambda_cnn,
        }
        self.temperature = temperature
        for one in (teacher, cnn_teacher):
            if one is not None:
                one.requires_grad_(False)
        self.train(student.training)

    def train(self, mode: bool = True) -> Distilled:
        """Sets the student's mode; teachers stay in eval mode."""
        super().train(mode)
        for one in (self.teacher, self.cnn_teacher):
            if one is not None:
                one.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor) -> FRDLosses:
        """Losses of a batch.

        Args:
            images: (B, in_channels, height, width), of the size in the student's config where
                tokens are recovered.
            targets: (B, classes) of probabilities, or (B) labels.
        """
        got = self.student(images, return_tokens=self.teacher is not None)
        heads: Sequence[Tensor] = (got,) if isinstance(got, Tensor) else got.heads
        if self.teacher is None:
            return _labels_alone(heads[0], targets)
        with torch.no_grad():
            wanted = self.teacher(images, return_tokens=True)
            labels = None if self.cnn_teacher is None else self.cnn_teacher(images)
        parts = self.student.training_parts
        return frd_losses(
            heads[0],
            got.tokens if parts is None else parts(got.tokens),
            wanted.logits,
            wanted.tokens,
            targets,
            temperature=self.temperature,
            dist_logits=None if labels is None else heads[1],
            cnn_logits=labels,
            **self.weights,
        )


def _labels_alone(logits: Tensor, targets: Tensor) -> FRDLosses:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = targets if not targets.is_floating_point() else targets.to(logits.dtype)
    cls = F.cross_entropy(logits, labels)
    none = torch.zeros_like(cls)
    return FRDLosses(cls, cls, none, none, none)


def _require_pair(student: SiT, teacher: SiT | None, cnn_teacher: nn.Module | None) -> None:
    """Raises unless the student learns with every part from somebody, and from nobody in vain."""
    config = student.config
    recovers = student.training_parts is not None
    if student.folded:
        raise ValueError(refusal("Distilled", "student", "one that is not folded", "a folded one"))
    if not config.num_classes:
        raise ValueError(refusal("Distilled", "student", "one with classes", "num_classes=0"))
    if config.dist_token != (cnn_teacher is not None):
        got = "none" if cnn_teacher is None else "one"
        allowed = f"one if and only if the student has dist_token, which is {config.dist_token}"
        raise ValueError(refusal("Distilled", "cnn_teacher", allowed, got))
    if teacher is None:
        if recovers and not config.dense:
            allowed = "one, from which the student's training parts learn"
            raise ValueError(refusal("Distilled", "teacher", allowed, None))
        if cnn_teacher is not None:
            raise ValueError(refusal("Distilled", "teacher", "one beside cnn_teacher", None))
        return
    if not teacher.config.dense:
        raise ValueError(refusal("Distilled", "teacher", "a dense SiT", "one that slims"))
    for name in ("embed_dim", "depth", "num_classes", "image_size", "in_channels"):
        ours, theirs = getattr(config, name), getattr(teacher.config, name)
        if ours != theirs:
            allowed = f"one with {name}={ours!r}, as the student"
            raise ValueError(refusal("Distilled", "teacher", allowed, repr(theirs)))
    if not (recovers or config.dense):
        allowed = "one with training_parts=True, which its teacher's tokens need"
        raise ValueError(refusal("Distilled", "student", allowed, "one without"))
