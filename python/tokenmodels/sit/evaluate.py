"""How often a SiT is right, by the official evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokenmodels._data.images import Images, open_images
from tokenmodels._data.order import Every
from tokenmodels._data.transforms import Centre
from tokenmodels._processes import Processes
from tokenmodels._refuse import refusal
from tokenmodels.sit.config import SiTConfig


class Accuracy(NamedTuple):
    """Shares of images in percent, over all processes.

    Attributes:
        top1: whose class is the likeliest.
        top5: whose class is among the five likeliest.
        loss: mean cross entropy.
        images: how many there were.
    """

    top1: float
    top5: float
    loss: float
    images: int


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    processes: Processes | None = None,
    precision: str = "fp32",
) -> Accuracy:
    """Accuracy over batches of images and labels; with several processes, over those of all.

    Args:
        model: images to logits, in eval mode.
        batches: of this process.
        processes: see there; one on the CPU if not given.
        precision: of the model: "fp32", or "bf16" or "fp16" by autocast.

    Example:
        >>> logits = torch.tensor([[2.0, 1, 0], [0, 2, 1]])
        >>> accuracy(nn.Identity(), [(logits, torch.tensor([0, 2]))]).top1
        50.0
    """
    processes = processes or Processes()
    totals = torch.zeros(3, dtype=torch.float64, device=processes.device)
    images_seen = 0
    for images, labels in batches:
        images = images.to(processes.device, non_blocking=True)
        labels = labels.to(processes.device, non_blocking=True)
        with processes.autocast(precision):
            logits = model(images)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack((best[:, 0].sum(), best.sum(), loss)).to(totals)
        images_seen += len(labels)
    top1, top5, loss_sum, count = processes.sum([*totals.tolist(), images_seen])
    if not count:
        raise ValueError(refusal("accuracy", "batches", "one or more", "none"))
    return Accuracy(100 * top1 / count, 100 * top5 / count, loss_sum / count, int(count))


def evaluation_loader(
    source: str,
    config: SiTConfig,
    processes: Processes,
    *,
    batch_size: int,
    workers: int,
    crop: float,
) -> DataLoader[Any]:
    """This process's share of the images, resized and cropped for a config."""
    images = open_images(source, evaluation_transform(config, crop))
    require_classes(images, config, source)
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=Every(len(images), rank=processes.rank, world=processes.world),
        num_workers=workers,
        pin_memory=processes.device.type == "cuda",
    )


def evaluation_transform(config: SiTConfig, crop: float = 224 / 256) -> Centre:
    """The official preparation of an image: resized, its middle cut out, normalised.

    Args:
        config: says for which size.
        crop: share of the resized short side that is kept.

    Returns:
        A function of a Pillow image that gives a float32 tensor (3, height, width).

    Example:
        >>> from PIL import Image
        >>> transform = evaluation_transform(SiTConfig.variant("sit_large"))
        >>> transform(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 288, 288])
    """
    return Centre(height_width(config), crop)


def height_width(config: SiTConfig) -> tuple[int, int]:
    """The size of the images that a config is made for."""
    size = config.image_size
    return size if isinstance(size, tuple) else (size, size)


def require_classes(images: Images, config: SiTConfig, source: str) -> None:
    """Raises unless the labels are those of the model.

    Raises:
        ValueError: other classes than the config has.
    """
    if images.classes and len(images.classes) != config.num_classes:
        allowed = f"{config.num_classes} class folders, as model.num_classes says"
        got = f"{len(images.classes)} in {source}"
        raise ValueError(refusal("data", "classes", allowed, got))
    if images.highest >= config.num_classes:
        allowed = f"labels below {config.num_classes}, as model.num_classes says"
        raise ValueError(refusal("data", "classes", allowed, f"{images.highest} in {source}"))
