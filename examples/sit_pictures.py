"""What `sit_digits.py` shows: a page of its figures, learning curves, slots drawn over images."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from PIL import Image
from tokenmodels._files import replace_file
from tokenmodels.sit import SiT, compose
from tokenmodels.sit.config import PATCH
from torch import Tensor

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

COLOURS = ("#222222", "#9a9a9a", "#b5483a", "#2a7f62", "#3b6ea5")
"""Of the teacher, and of the students in the order of the result."""


def names(result: dict[str, Any]) -> list[str]:
    """The models of a result, the teacher first."""
    return list(dict.fromkeys(row["model"] for row in result["runs"]))


def tests(result: dict[str, Any], name: str) -> list[float]:
    """Test accuracy of a model, seed by seed."""
    return [row["test"] for row in result["runs"] if row["model"] == name]


def table(result: dict[str, Any]) -> str:
    """Test accuracy in percent per model and seed, as Markdown."""
    setup, teacher = result["setup"], names(result)[0]
    heads = ["model", "MMAC", "labelled images", *(f"seed {one}" for one in setup["seeds"]), "mean"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name in names(result):
        macs = result["macs"]["teacher" if name == teacher else "student"]
        given = setup["labelled" if name == teacher else "few"]
        values = tests(result, name)
        figures = [f"{value:.1f}" for value in (*values, fmean(values))]
        lines.append([name, f"{macs / 1e6:.1f}", str(given), *figures])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(result: dict[str, Any]) -> str:
    """The whole page; no figure in it but those of the result."""
    setup, photographs = result["setup"], result["photographs"]
    teacher, _, plain, frd, _ = names(result)
    pairs = list(zip(tests(result, frd), tests(result, plain), strict=True))
    gain = fmean(one - other for one, other in pairs)
    loss = fmean(tests(result, teacher)) - fmean(tests(result, frd))
    return PAGE.format(
        **(setup | result["machine"] | result["loss"][frd]),
        table=table(result),
        left=" → ".join(map(str, result["patches"])),
        gain=f"{gain:.1f} points {'better' if gain > 0 else 'worse'}",
        better=sum(one > other for one, other in pairs),
        repeated=len(pairs),
        loss=f"{loss:.1f}",
        fewer=f"{result['macs']['teacher'] / result['macs']['student']:.2f}",
        image=f"{100 / setup['test']:.2f}",
        pieces=photographs["pieces"],
        teacher_pieces=f"{photographs[teacher]:.1f}",
        student_pieces=f"{photographs[frd]:.1f}",
        height=2 * setup["photograph_size"],
        width=3 * setup["photograph_size"],
        minutes=f"{result['seconds'] / 60:.1f}",
        before=f"{result['load']['before']:.1f}",
        after=f"{result['load']['after']:.1f}",
        torch=result["machine"]["versions"]["torch"],
    )


PAGE = """# SiT on digits: what distillation from a dense teacher is worth

```sh
PYTHONPATH=.:python .venv/bin/python examples/sit_digits.py \\
    --out bench/results/sit-digits-cpu.json --docs docs
```

The 1797 digits that scikit-learn ships with, made {image_size} pixels wide: {left} patch tokens,
half of which each slimming keeps. The teacher learns from {labelled} labelled images; a student is
given only {few} of them, as where a network is slimmed and most of the data that it was trained on
is no longer at hand. Of {test} test images so many are classified rightly, in %:

{table}

- The student with FRD is {gain} than the one that learns from the labels alone, and better on
  {better} of {repeated} seeds. The two begin with the same weights, meet the same batches and take
  as many steps, {student_steps}: only the loss differs. Against the teacher it loses {loss} points,
  with {fewer} times fewer multiply-accumulates, the stem's included, which nothing slims.
- Test images are looked at once, when a model is done. How students are trained was chosen on
  {validation} other images, for both alike, and so were the weights of FRD: {lambda_token:g} for
  tokens, {lambda_logits:g} for logits, temperature {temperature:g}. The last row has those for
  ImageNet: 2, 2 and 1.
- This is a setting in which a teacher matters, and it was looked for, on those other images;
  others, with more labels or more steps, are not shown here.
- One test image is {image} points, and three seeds are few: a difference below a point means
  little.

![validation accuracy by step, from 60 % on](sit_digits_curves.png)

Which patches the slots are made of, through all slimmings. In colour: the slot that takes most of a
patch. Then what each of the last slots takes of every patch: the brighter, the more.

![slots over digits](sit_digits_slots.png)

A network that knows grey digits has little to say about a photograph. So a second teacher and
student, of three channels and with the same losses, learn two photographs of scikit-learn: from
which of them a piece of {photograph_size} x {photograph_size} pixels is, and how it is turned (8
classes). Of {pieces} other pieces of the same photographs the teacher places {teacher_pieces} %
rightly, the student, which goes on from it, {student_pieces} %. Below the student sees them whole,
{height} x {width} pixels at once, six times the patches of a piece.

![slots over photographs](sit_photograph_slots.png)

From `bench/results/sit-digits-cpu.json`: all of it together took {minutes} minutes on one thread of
{cpu} ({cores} cores; load {before} before and {after} at the end, 1 of which is this run),
{instruction_set}, torch {torch}, commit {commit}.
"""


def draw_curves(result: dict[str, Any], path: Path) -> None:
    """Validation accuracy by step, the teacher's beside the students': a thin line per seed, the
    mean as a thick one.
    """
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(10, 4.4), width_ratios=(1, 1.7), layout="constrained"
    )
    for name, colour in zip(names(result), COLOURS, strict=True):
        axes = left if name == names(result)[0] else right
        curves = [row["curve"] for row in result["runs"] if row["model"] == name]
        steps = [step for step, _ in curves[0]]
        values = torch.tensor([[value for _, value in curve] for curve in curves])
        axes.plot(steps, values.T, color=colour, linewidth=0.7, alpha=0.5)
        axes.plot(steps, values.mean(0), color=colour, linewidth=2.2, label=name)
    left.set(ylabel="validation images classified rightly, %", title="Teacher", ylim=(60, 100))
    right.set(title="Students")
    for axes in (left, right):
        axes.set(xlabel="step")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.suptitle("A thin line per seed, a thick one for their mean", fontsize=10)
    save(figure, path)


@torch.inference_mode()
def draw_assignments(model: SiT, images: Tensor, path: Path, title: str) -> None:
    """Per image a row: itself; per slimming the slot that takes most of each patch, as a colour;
    and what each of the last slots takes of the patches.

    Args:
        images: (B, channels, height, width) from -1 to 1.
    """
    assignments = model(images, return_assignment=True).assignments
    through = [compose(assignments[: i + 1]) for i in range(len(assignments))]
    grid, last = tuple(-(-size // PATCH) for size in images.shape[2:]), through[-1]
    heads = [
        f"{grid[0] * grid[1]} patches",
        *(f"slimming {i + 1}: {taken.shape[1]} slots" for i, taken in enumerate(through)),
        *(f"slot {i + 1} of the last {last.shape[1]}" for i in range(last.shape[1])),
    ]
    size = (2.1 * len(heads), (2.1 * images.shape[2] / images.shape[3] + 0.12) * len(images) + 0.5)
    figure, axes = pyplot.subplots(
        len(images), len(heads), figsize=size, layout="constrained", squeeze=False
    )
    for row, image in zip(axes, images, strict=True):
        for axis in row:
            axis.imshow((image.permute(1, 2, 0) + 1) / 2, cmap="gray", extent=extent(image))
            axis.set_axis_off()
    for i, image in enumerate(images):
        coloured, heated = axes[i, 1 : 1 + len(through)], axes[i, 1 + len(through) :]
        for axis, taken in zip(coloured, through, strict=True):
            colour_by_slot(axis, taken[i].argmax(0).unflatten(0, grid), taken.shape[1], image)
        for axis, weights in zip(heated, last[i], strict=True):
            heat(axis, weights.unflatten(0, grid), image)
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=9)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def extent(image: Tensor) -> tuple[float, float, float, float]:
    """The place of an image in pixels, for everything that is drawn over it."""
    return (0, image.shape[2], image.shape[1], 0)


def colour_by_slot(axis: Any, slot: Tensor, slots: int, image: Tensor) -> None:
    """Paints every patch in the colour of its slot."""
    wheel = pyplot.get_cmap("hsv")(torch.arange(slots).numpy() / slots)
    axis.imshow(
        slot,
        cmap=ListedColormap(wheel),
        vmin=-0.5,
        vmax=slots - 0.5,
        alpha=0.55,
        interpolation="nearest",
        extent=extent(image),
    )


def heat(axis: Any, weights: Tensor, image: Tensor) -> None:
    """Darkens what a slot takes little of."""
    axis.imshow(
        weights / weights.max(),
        cmap="magma",
        vmin=0,
        vmax=1,
        alpha=0.75,
        interpolation="nearest",
        extent=extent(image),
    )


def save(figure: Figure, path: Path) -> None:
    """As a PNG of few colours, which photographs need a third of the bytes in."""
    whole = io.BytesIO()
    figure.savefig(whole, format="png", dpi=110)
    pyplot.close(figure)
    picture = Image.open(whole).convert("RGB")
    picture = picture.quantize(palette=picture.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    replace_file(path, lambda unfinished: picture.save(unfinished, "png", optimize=True))
