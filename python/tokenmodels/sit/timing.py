"""Images per second of inference, by the protocol of LeViT, with everything folded exactly."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tokenmodels._processes import Processes
from tokenmodels._refuse import refusal
from tokenmodels.sit.evaluate import height_width
from tokenmodels.sit.model import SiT

MODES = ("trace", "eager", "compile")


class Throughput(NamedTuple):
    """What was timed.

    Attributes:
        images_per_second: by the mean time of a batch.
        milliseconds: mean time of a batch.
        batches: how many were timed.
    """

    images_per_second: float
    milliseconds: float
    batches: int


def throughput(
    model: SiT,
    *,
    batch_size: int,
    precision: str = "fp32",
    mode: str = "trace",
    warm_up: float = 10.0,
    seconds: float = 60.0,
    device: str = "cpu",
) -> Throughput:
    """Times whole batches one by one, each to its end, for so many seconds behind a warm-up.

    The model is folded (`SiT.fold_for_inference`), which changes what it gives by rounding alone.

    Source: Graham et al., "LeViT: a Vision Transformer in ConvNet's Clothing", ICCV 2021; it warms
    up for 10 seconds, times 60, with 16 images on one thread of a CPU, or 1024 and more on a GPU
    by autocast to float16.

    Args:
        model: stays as it is.
        batch_size: images per batch, of the size in the config, of normal noise.
        precision: "fp32", or "bf16" or "fp16" by autocast.
        mode: "trace" (`torch.jit.trace`, as the protocol has it; of torch's own operators, which on
            a CPU is slower than the others), "eager" or "compile".
        warm_up: seconds.
        seconds: of timing; one batch at least.
        device: "cpu", or "cuda" with a number if wanted.

    Example:
        >>> model = SiT(SiTConfig(embed_dim=16, depth=2, num_heads=2, stages=(1, 1), image_size=32))
        >>> throughput(model, batch_size=2, warm_up=0, seconds=0.01).images_per_second > 0
        True
    """
    if mode not in MODES:
        raise ValueError(refusal("throughput", "mode", ", ".join(MODES), repr(mode)))
    place = Processes(device=torch.device(device))
    folded = model.fold_for_inference().to(place.device)
    size = height_width(model.config)
    with torch.inference_mode(), place.autocast(precision):
        images = torch.randn(batch_size, model.config.in_channels, *size, device=place.device)
        run = _prepared(folded, images, mode)
        _timed(run, images, warm_up)
        times = _timed(run, images, seconds)
    mean = sum(times) / len(times)
    return Throughput(batch_size / mean, 1e3 * mean, len(times))


def _prepared(model: SiT, images: Tensor, mode: str) -> Callable[[Tensor], Tensor]:
    if mode == "compile":
        return torch.compile(model)
    if mode == "trace":
        with warnings.catch_warnings():  # of shapes that become constants, as they are here
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.trace(model, images, check_trace=False)
    return model


def _timed(run: Callable[[Tensor], Tensor], images: Tensor, seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        _wait(images)
        begin = time.perf_counter()
        run(images)
        _wait(images)
        times.append(time.perf_counter() - begin)
    return times


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
