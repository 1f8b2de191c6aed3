"""SiT from photograph to logits: dense and slimmed, as its authors formulated it and as we run it.

`python -m bench.bench_models [--quick]`. The photographs are those inside scikit-learn; the weights
are random, which changes no cost.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "python"))

from tokenmodels.sit import VARIANTS, SiT, SiTConfig

from bench import official_sit, report, settings, timing

Record = dict[str, Any]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ("sit_tiny", "sit_xsmall", "sit_small")
"""The variants that are timed: the larger ones spend their time in the same kernels."""
TOLERANCE = 1e-4
"""Of the largest logit: two ways to the same float32 numbers."""


def run(quick: bool) -> list[Record]:
    """Times every model; one record per model, batch size, form and dtype.

    Columns: `GMAC` is of one image. `faster` is the time of the dense network in the same form over
    this one's; `in theory` the same of their multiply-accumulates; `realised` the former over the
    latter: the share of the theoretical saving that arrives.

    Raises:
        AssertionError: our logits are not the official formulation's.
    """
    settings.keep_freed_memory()
    names = NAMES[:2] if quick else NAMES
    batches = (1, 4) if quick else (1, 8)
    records = []
    console = report.console()
    with report.progress(console) as bar, torch.inference_mode():
        task = bar.add_task("models", total=len(names) * len(batches))
        for name in names:
            forms = forms_of(VARIANTS[name])
            for batch in batches:
                records += list(_rows(name, forms, photographs(batch), 2.5 if quick else 4.0))
                bar.advance(task)
    return records


def photographs(batch: int, size: int = 224) -> Tensor:
    """`batch` different crops of scikit-learn's photographs, normalised: (batch, 3, size, size)."""
    from sklearn.datasets import load_sample_images

    crops = []
    for number, image in enumerate(load_sample_images().images):
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        height, width = pixels.shape[2:]
        scale = size * 8 / 7 / min(height, width)
        shape = [round(height * scale), round(width * scale)]
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True)[0]
        count = (batch + 1 - number) // 2
        for i in range(count):
            top = (shape[0] - size) // 2
            left = (shape[1] - size) * (2 * i + 1) // (2 * count)
            crops.append(pixels[:, top : top + size, left : left + size])
    normal = (torch.stack(crops) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    return normal.contiguous()


def forms_of(
    config: SiTConfig, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[tuple[str, bool], tuple[SiTConfig, Callable[[Tensor], Any]]]:
    """(form, slimmed or not) → what it computes, and how; the two forms share their weights."""
    forms: dict[tuple[str, bool], tuple[SiTConfig, Callable[[Tensor], Any]]] = {}
    for slim in (False, True):
        torch.manual_seed(0)
        model = SiT(replace(config, dense=not slim)).eval()
        forms["ours", slim] = model.config, model.fold_for_inference().to(device, dtype)
        forms["official", slim] = model.config, partial(_official, model.to(device, dtype))
    return forms


def _official(model: SiT, images: Tensor) -> Tensor:
    return official_sit.forward(model, images)[0]


def _rows(name: str, forms: Any, images: Tensor, seconds: float) -> Iterator[Record]:
    for slim in (False, True):
        want, got = forms["official", slim][1](images), forms["ours", slim][1](images)
        error = (got - want).abs().max().item() / want.abs().max().item()
        assert error <= TOLERANCE, f"{name}: our logits are off by {error:.2g} of the largest one"
    calls: dict[tuple[str, bool], timing.Call] = {
        key: partial(function, images) for key, (_, function) in forms.items()
    }
    samples = timing.alternate(calls, seconds, (5, 25))
    times = {key: statistics.median(values) for key, values in samples.items()}
    yield from records(name, forms, times, len(images))


def records(
    name: str, forms: Any, times: dict[tuple[str, bool], float], batch: int
) -> Iterator[Record]:
    """One record per form, dense and slimmed, from the seconds that each takes."""
    for (form, slim), (config, _) in forms.items():
        macs, dense = config.macs(), forms[form, False][0].macs()
        faster, theory = times[form, False] / times[form, slim], dense / macs
        yield {
            "model": name if slim else f"{name}, dense",
            "form": form,
            "batch": batch,
            "ms": times[form, slim] * 1e3,
            "images/s": batch / times[form, slim],
            "GMAC": macs / 1e9,
            "faster": faster,
            "in theory": theory,
            "realised": f"{faster / theory:.0%}" if slim else "",
            "than official": times["official", slim] / times[form, slim],
        }


def main() -> None:
    """Prints the table that `python -m bench` shows with the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two models, small batches")
    options = parser.parse_args()
    settings.restart()
    from bench import tables

    report.console().print(report.drawn(tables.of_records("Models", run(options.quick))))


if __name__ == "__main__":
    main()
