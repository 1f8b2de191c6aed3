"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """Keeps `model`, a copy whose weights follow those of the model that is trained.

    Running statistics and counters are taken over as they are.

    Args:
        model: stays as it is; its copy is in eval mode and has no gradients.
        decay: share of the old average that stays with each update.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = Average(model, decay=0.75)
        >>> before = model.weight.item()
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(4)
        >>> average.update(model)
        >>> round(average.model.weight.item() - before, 4)
        1.0
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's weights."""
        for kept, new in zip(self.model.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1 - self.decay)
        for mine, value in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(value)
