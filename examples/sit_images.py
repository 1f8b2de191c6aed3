"""What `sit_digits.py` trains, and on which images: digits and photographs of scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split
from tokenmodels.sit import SiTConfig
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained, on how many images, for how long.

    Attributes:
        seeds: one repetition each: a seed gives the weights at the start, the students' images, the
            order of images and how they are moved.
        test: images that are looked at once, at the end.
        validation: images that curves are drawn of, and that these numbers were chosen by.
        labelled: images that the teacher learns from; these three parts never change.
        few: those of them that students are given.
        shift: pixels of the 8 x 8 by which images are moved in training, at most.
        turn: radians by which they are turned.
        spread: of the slots at the start, see `SlimTokens.spread`.
        points: of a curve.
        photograph_size: pixels of the pieces of photographs.
        photograph_steps: for their teacher, and for their student.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    test: int = 599
    validation: int = 398
    labelled: int = 800
    few: int = 50
    shift: float = 1.0
    turn: float = 0.2
    image_size: int = 64
    embed_dim: int = 64
    depth: int = 6
    num_heads: int = 2
    stages: tuple[int, ...] = (2, 2, 1, 1)
    keep: float = 0.5
    spread: float = 2.0
    teacher_steps: int = 500
    student_steps: int = 100
    batch_size: int = 64
    teacher_lr: float = 2e-3
    student_lr: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 5.0
    points: int = 10
    photograph_size: int = 96
    photograph_steps: int = 250

    def digits(self, *, dense: bool = False) -> SiTConfig:
        """The student of digits, or its teacher."""
        return self._network(dense, self.image_size, channels=1, classes=10)

    def photographs(self, *, dense: bool = False) -> SiTConfig:
        """The student of pieces of two photographs in four positions, or its teacher."""
        return self._network(dense, self.photograph_size, channels=3, classes=8)

    def _network(self, dense: bool, image_size: int, *, channels: int, classes: int) -> SiTConfig:
        return SiTConfig(
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            stages=() if dense else self.stages,
            keep=self.keep,
            dense=dense,
            image_size=image_size,
            in_channels=channels,
            num_classes=classes,
        )


class Labelled(NamedTuple):
    """Images (B, channels, size, size) from -1 to 1, and their classes."""

    images: Tensor
    labels: Tensor


def digits(setup: Setup) -> dict[str, Labelled]:
    """Disjoint parts of the 8 x 8 digits, classes in equal shares, made larger."""
    found = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None] / 16
    sizes = (setup.image_size, setup.image_size)
    images = F.interpolate(pixels, sizes, mode="bicubic").clamp(0, 1) * 2 - 1
    rest = Labelled(images, torch.from_numpy(found.target).long())
    parts = {}
    for name in ("test", "validation", "labelled"):
        parts[name], rest = parted(rest, getattr(setup, name), seed=0)
    return parts


def parted(data: Labelled, count: int, *, seed: int) -> tuple[Labelled, Labelled]:
    """So many images, classes in the shares that they have in all of them, and the rest."""
    places = np.arange(len(data.labels))
    if count == len(places):
        return data, Labelled(data.images[:0], data.labels[:0])
    split = train_test_split(places, train_size=count, stratify=data.labels, random_state=seed)
    one, other = (Labelled(data.images[part], data.labels[part]) for part in split)
    return one, other


def batches(data: Labelled, setup: Setup, seed: int) -> Iterator[Labelled]:
    """Without end; every image once before any comes again, each time moved and turned anew."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < setup.batch_size:
            order = torch.cat((order, torch.randperm(len(data.labels), generator=generator)))
        chosen, order = order[: setup.batch_size], order[setup.batch_size :]
        yield Labelled(moved(data.images[chosen], setup, generator), data.labels[chosen])


def moved(images: Tensor, setup: Setup, generator: torch.Generator) -> Tensor:
    """Each image shifted and turned by chance, black (-1) around it."""
    count = len(images)
    angles = (torch.rand(count, generator=generator) * 2 - 1) * setup.turn
    shifts = (torch.rand(count, 2, generator=generator) * 2 - 1) * setup.shift / 4
    cos, sin = angles.cos(), angles.sin()
    rows = torch.stack((cos, -sin, shifts[:, 0], sin, cos, shifts[:, 1]), 1).unflatten(1, (2, 3))
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def photographs(setup: Setup) -> Tensor:
    """scikit-learn's two, (2, 3, height, width) from -1 to 1, as high as two pieces of them."""
    sizes = (2 * setup.photograph_size, 3 * setup.photograph_size)
    pixels = np.stack([load_sample_image(name) for name in ("china.jpg", "flower.jpg")])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    small = F.interpolate(images, sizes, mode="bicubic", antialias=True)
    return small.clamp(0, 1) * 2 - 1


def pieces(images: Tensor, setup: Setup, seed: int) -> Iterator[Labelled]:
    """Batches without end of square pieces; a class is the photograph and by how many quarters the
    piece is turned.
    """
    generator = torch.Generator().manual_seed(seed)
    size, count = setup.photograph_size, setup.batch_size // 2
    tops, lefts = (extent - size + 1 for extent in images.shape[2:])
    while True:
        found, labels = [], torch.randint(4 * len(images), (count,), generator=generator)
        for label in labels.tolist():
            top = int(torch.randint(tops, (), generator=generator))
            left = int(torch.randint(lefts, (), generator=generator))
            piece = images[label // 4, :, top : top + size, left : left + size]
            found.append(piece.rot90(label % 4, (1, 2)))
        yield Labelled(torch.stack(found), labels)
