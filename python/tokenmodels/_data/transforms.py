"""Pillow images to normalised tensors: the official evaluation, the official augmentation, by timm,
and a plain one that needs neither timm nor torchvision.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokenmodels._optional import optional
from tokenmodels._refuse import refusal

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to training images, one by one and as a batch; officially, if nothing is said.

    Attributes:
        transforms: "official" is everything below, by timm; "plain" is crop and flip alone, which
            need Pillow only.
        scale: share of the image's area that a crop has, from and to.
        ratio: width / height of a crop, from and to.
        flip: probability of mirroring left and right.
        auto_augment: timm's name of the policy; "" for none.
        color_jitter: strength, where there is no policy.
        erase: probability that a rectangle is replaced by noise.
        repeats: how often an image stands in an epoch's order, each time augmented anew.
        mixup: parameter of the share at which two images are blended; 0 for never.
        cutmix: parameter of the share of another image that is pasted in; 0 for never.
        mix: probability that a batch is mixed at all.
        switch: probability that it is then by pasting, where both are possible.
        smoothing: share of every target that is spread over all classes.
    """

    transforms: Literal["official", "plain"] = "official"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    erase: float = 0.25
    repeats: int = 3
    mixup: float = 0.8
    cutmix: float = 1.0
    mix: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name in ("flip", "erase", "mix", "switch", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    refusal("config", f"augment.{name}", "0 to 1", getattr(self, name))
                )
        for name in ("mixup", "cutmix", "color_jitter"):
            if getattr(self, name) < 0:
                raise ValueError(
                    refusal("config", f"augment.{name}", "0 or more", getattr(self, name))
                )
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                allowed = "[from, to], above 0"
                raise ValueError(refusal("config", f"augment.{name}", allowed, getattr(self, name)))
        if self.repeats < 1:
            raise ValueError(refusal("config", "augment.repeats", "1 or more", self.repeats))


def to_tensor(image: Any) -> Tensor:
    """An RGB Pillow image → (3, height, width), normalised by ImageNet's mean and deviation."""
    width, height = image.size
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    x = pixels.view(height, width, 3).permute(2, 0, 1).contiguous().float().div_(255)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return x.sub_(mean[:, None, None]).div_(std[:, None, None])


@dataclass(frozen=True)
class Centre:
    """The official evaluation: the short side to `size` / `crop`, bicubic, then the middle.

    Args:
        size: (height, width) out.
        crop: share of the resized short side that is kept; 224 / 256 officially.

    Example:
        >>> from PIL import Image
        >>> Centre((224, 224))(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 224, 224])
    """

    size: tuple[int, int]
    crop: float = 224 / 256

    def __call__(self, image: Any) -> Tensor:
        height, width = self.size
        short = int(min(height, width) / self.crop)
        old_width, old_height = image.size
        if old_width <= old_height:
            new = (short, int(short * old_height / old_width))
        else:
            new = (int(short * old_width / old_height), short)
        # A wanted shape that is not square may need more than the short side gives.
        stretch = max(width / new[0], height / new[1], 1.0)
        new = (math.ceil(new[0] * stretch), math.ceil(new[1] * stretch))
        image = image.resize(new, _bicubic())
        left, top = round((new[0] - width) / 2.0), round((new[1] - height) / 2.0)
        return to_tensor(image.crop((left, top, left + width, top + height)))


def _bicubic() -> Any:
    return optional("PIL.Image", use="resizing images", extra="train").Resampling.BICUBIC


@dataclass(frozen=True)
class Plain:
    """A random crop of random size and shape, resized, perhaps mirrored."""

    size: tuple[int, int]
    augmentation: Augmentation

    def __call__(self, image: Any) -> Tensor:
        box = _random_box(image.size, self.augmentation.scale, self.augmentation.ratio)
        image = image.resize((self.size[1], self.size[0]), _bicubic(), box=box)
        x = to_tensor(image)
        return x.flip(2) if random.random() < self.augmentation.flip else x


def _random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop of random area and shape; all of it if none fits."""
    width, height = size
    for _ in range(10):
        area = random.uniform(*scale) * width * height
        shape = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        across, down = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < across <= width and 0 < down <= height:
            left, top = random.randint(0, width - across), random.randint(0, height - down)
            return left, top, left + across, top + down
    return 0, 0, width, height


def training_transform(size: tuple[int, int], augmentation: Augmentation) -> Any:
    """What is done to each training image.

    Raises:
        ImportError: the official transforms, and timm or torchvision is not installed.
    """
    if augmentation.transforms == "plain":
        return Plain(size, augmentation)
    use = "augment.transforms 'official' (or else 'plain')"
    optional("torchvision", use=use, extra="train")
    timm = optional("timm.data", use=use, extra="train")
    return timm.create_transform(
        size,
        is_training=True,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.flip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment or None,
        interpolation="bicubic",
        re_prob=augmentation.erase,
        re_mode="pixel",
        re_count=1,
        mean=MEAN,
        std=STD,
    )
