"""Mixup, CutMix and label smoothing of a whole batch."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tokenmodels._data.transforms import Augmentation


def mix(
    images: Tensor, labels: Tensor, classes: int, augmentation: Augmentation, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Blends every image with that at the other end of the batch, or pastes a rectangle of it.

    One share for the whole batch: Beta(a, a) with the `mixup` or `cutmix` of `augmentation` as a.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al.,
    "CutMix", ICCV 2019.

    Args:
        images: (B, channels, height, width).
        labels: (B), class numbers.
        classes: how many there are.
        augmentation: see there.
        seed: all that is random depends on it alone.

    Returns:
        Images, and targets (B, classes) of probabilities, float32.

    Example:
        >>> images, labels = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
        >>> mix(images, labels, 2, Augmentation(mix=0.0, smoothing=0.0), seed=0)[1]
        tensor([[1., 0.],
                [0., 1.]])
    """
    targets = smoothed(labels, classes, augmentation.smoothing)
    drawn = random.Random(seed)
    by_paste = _by_paste(drawn, augmentation)
    if by_paste is None:
        return images, targets
    alpha = augmentation.cutmix if by_paste else augmentation.mixup
    share = drawn.betavariate(alpha, alpha)
    if by_paste:
        images, share = _paste(images, share, drawn)
    else:
        images = images.lerp(images.flip(0), 1 - share)
    return images, targets.lerp(targets.flip(0), 1 - share)


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot rows, of which a share is spread evenly: (B) → (B, classes)."""
    targets = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)


def _by_paste(drawn: random.Random, augmentation: Augmentation) -> bool | None:
    """Whether CutMix; None for neither."""
    if drawn.random() >= augmentation.mix or not (augmentation.mixup or augmentation.cutmix):
        return None
    if augmentation.mixup and augmentation.cutmix:
        return drawn.random() < augmentation.switch
    return augmentation.cutmix > 0


def _paste(images: Tensor, share: float, drawn: random.Random) -> tuple[Tensor, float]:
    """Pastes a rectangle of 1 - share of the area, cut at the borders; tells what is left."""
    height, width = images.shape[2:]
    side = (1 - share) ** 0.5
    rows, columns = (_interval(size, side, drawn) for size in (height, width))
    pasted = images.clone()
    pasted[..., rows, columns] = images.flip(0)[..., rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return pasted, 1 - area / (height * width)


def _interval(size: int, share: float, drawn: random.Random) -> slice:
    """A random place's surroundings, cut at the borders."""
    half, middle = int(size * share) // 2, drawn.randrange(size)
    return slice(max(middle - half, 0), min(middle + half, size))
