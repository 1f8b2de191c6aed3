"""Teachers by what a recipe calls them, and the student that learns from them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tokenmodels._optional import optional
from tokenmodels._refuse import refusal
from tokenmodels._seeds import mixed
from tokenmodels.sit.distilled import Distilled
from tokenmodels.sit.model import SiT
from tokenmodels.sit.recipe import Recipe

TIMM = "timm:"


def open_sit(source: str, *, variant: str | None = None) -> SiT:
    """A SiT from a folder of `save_pretrained`, a hub id, or a file of the official code.

    Args:
        source: which.
        variant: see `SiT.from_official`; for files alone.
    """
    if Path(source).is_file():
        return SiT.from_official(source, variant=variant)
    return SiT.from_pretrained(source)


def open_classifier(source: str) -> nn.Module:
    """A SiT, or after "timm:" a pretrained model of timm; images to logits."""
    if not source.startswith(TIMM):
        return open_sit(source)
    timm = optional("timm", use=f"distil.cnn_teacher {source!r}", extra="train")
    return timm.create_model(source.removeprefix(TIMM), pretrained=True)


def build(recipe: Recipe) -> Distilled:
    """Student and teachers, on the CPU; the student begins as the seed and the teacher say."""
    config, distil = recipe.model, recipe.distil
    teacher = open_sit(distil.teacher) if distil.teacher else None
    cnn_teacher = open_classifier(distil.cnn_teacher) if distil.cnn_teacher else None
    torch.manual_seed(mixed("weights", recipe.run.seed))
    student = SiT(config, training_parts=teacher is not None and not config.dense).train()
    if teacher is not None:
        if not teacher.config.dense:
            allowed = "a dense SiT"
            raise ValueError(refusal("config", "distil.teacher", allowed, "one that slims"))
        if teacher.config.image_size != config.image_size:
            teacher = teacher.resized(config.image_size)
        if distil.from_teacher:
            student.transplant(teacher)
    student.set_recompute(recipe.run.recompute)
    return Distilled(
        student,
        teacher,
        cnn_teacher=cnn_teacher,
        lambda_token=distil.lambda_token,
        lambda_logits=distil.lambda_logits,
        lambda_cnn=distil.lambda_cnn,
        temperature=distil.temperature,
    )
