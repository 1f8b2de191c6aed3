"""Which images a process sees, and when: the same for a seed and an epoch, from any step on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from tokenmodels._refuse import refusal
from tokenmodels._seeds import mixed


class Draw(NamedTuple):
    """One image to be read: its number, and the seed of its augmentation."""

    image: int
    seed: int


class Batches(Sampler[list[Draw]]):
    """Batches of an epoch with repeated augmentation, for one of several processes.

    All images are shuffled; each stands `repeats` times in a row, dealt out one by one to the
    processes, so that its repetitions meet in one step; the epoch ends after as many draws as there
    are images, which are then about 1 / `repeats` of all. An epoch is cut to a multiple of 256
    draws, and to whole batches.

    Source: Hoffer et al., "Augment your batch", CVPR 2020; the cut is that of Touvron et al.,
    "Training data-efficient image transformers", ICML 2021.

    Args:
        images: how many there are.
        batch_size: of this process.
        seed: of the whole run.
        repeats: how often an image is drawn in a row.
        rank: of this process.
        world: number of processes.

    Raises:
        ValueError: not one batch per epoch.

    Example:
        >>> batches = Batches(4, 4, seed=0, repeats=2)
        >>> [[draw.image for draw in batch] for batch in batches]
        [[2, 2, 3, 3]]
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        seed: int = 0,
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.batch_size, self.seed, self.repeats = images, batch_size, seed, repeats
        self.rank, self.world = rank, world
        drawn = images // 256 * 256 or images
        self.steps = drawn // world // batch_size
        if self.steps < 1:
            allowed = f"at least one batch of {batch_size} for each of {world} processes"
            raise ValueError(refusal("data", "images", allowed, images))
        self.begin(0, 0)

    def begin(self, epoch: int, step: int) -> None:
        """The next iteration is over this epoch's batches from this one on."""
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        return self.steps - self.step

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(mixed("order", self.seed, epoch))
        order = torch.randperm(self.images, generator=generator)
        for step in range(self.step, self.steps):
            first = step * self.batch_size
            positions = [(first + i) * self.world + self.rank for i in range(self.batch_size)]
            yield [
                Draw(int(order[p // self.repeats]), mixed("image", self.seed, epoch, p))
                for p in positions
            ]


class Every(Sampler[Draw]):
    """Every image once, in order, of one of several processes: no image twice, none left out.

    Example:
        >>> [draw.image for draw in Every(5, rank=1, world=2)]
        [1, 3]
    """

    def __init__(self, images: int, *, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, images, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(index, 0) for index in self.indices)
