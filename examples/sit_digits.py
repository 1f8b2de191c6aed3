"""SiT on scikit-learn's digits: what a dense teacher's tokens and logits are worth to a student.

Usage: PYTHONPATH=.:python python examples/sit_digits.py [--out RESULT.json] [--docs FOLDER]

A dense teacher learns from many labelled digits. Students of its shape, which keep half of the
patch tokens at each of three slimmings, are given few of them. They learn from the labels alone, or
from the teacher too, by feature recalibration distillation (FRD). Those that are compared begin
with the same weights, meet the same batches, take as many steps. `--out` keeps the figures; the
folder of `--docs` gets a page of them and pictures.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sit_images import Labelled, Setup, batches, digits, parted, photographs, pieces
from sit_pictures import draw_assignments, draw_curves, page, table
from tokenmodels._files import replace_file
from tokenmodels.sit import Distilled, SiT, SiTConfig, accuracy, parameter_groups
from tokenmodels.sit.recipe import Optimisation

from bench.machine import facts

TEACHER = "dense teacher"
SCRATCH = "student, labels alone, from random weights"
PLAIN = "student, labels alone, from the teacher's weights"
FRD = "student, FRD, from the teacher's weights"
OFFICIAL = "student, FRD with ImageNet's loss weights, from the teacher's weights"
LOSS = {
    FRD: {"lambda_token": 0.5, "lambda_logits": 2.0, "temperature": 4.0},
    OFFICIAL: {"lambda_token": 2.0, "lambda_logits": 2.0, "temperature": 1.0},
}
"""How much the teacher counts; the first for little data, chosen on validation images."""

Watch = Callable[[str, int, int], None]
"""Is told of every step: what is trained, steps done, steps in all."""


def fit(
    distilled: Distilled,
    data: Iterator[Labelled],
    steps: int,
    lr: float,
    setup: Setup,
    on_step: Callable[[int], None],
) -> SiT:
    """Trains the student for so many batches by AdamW, the rate falling along a cosine."""
    optim = Optimisation(
        lr=lr * 512 / setup.batch_size,
        batch_size=setup.batch_size,
        epochs=steps,
        weight_decay=setup.weight_decay,
    )
    optimizer = torch.optim.AdamW(parameter_groups(distilled.student, optim))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = optim.rate(step, optim.peak(setup.batch_size, group["factor"]))
        losses = distilled.train()(*next(data))
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(distilled.student.parameters(), setup.clip)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1)
    return distilled.student.eval()


def measured(
    name: str,
    distilled: Distilled,
    parts: dict[str, Labelled],
    setup: Setup,
    seed: int,
    watch: Watch,
) -> dict[str, Any]:
    """Trains on what the model is given; accuracy on validation images on the way, on test images
    once.
    """
    teaches = name == TEACHER
    given = parts["labelled" if teaches else "few"]
    steps = setup.teacher_steps if teaches else setup.student_steps
    begin, curve, model = time.perf_counter(), [], distilled.student

    def on_step(done: int) -> None:
        watch(f"seed {seed}, {name}", done, steps)
        if done % max(steps // setup.points, 1) == 0 or done == steps:
            curve.append((done, accuracy(model.eval(), [parts["validation"]]).top1))

    lr = setup.teacher_lr if teaches else setup.student_lr
    fit(distilled, batches(given, setup, seed), steps, lr, setup, on_step)
    return {
        "seed": seed,
        "model": name,
        "test": accuracy(model, [parts["test"]]).top1,
        "curve": curve,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def new_student(config: SiTConfig, setup: Setup) -> SiT:
    """With random weights, and slots that differ from the first step on."""
    student = SiT(config, training_parts=True)
    for slim in student.slims:
        slim.spread(setup.spread)
    return student


def one_seed(
    parts: dict[str, Labelled], setup: Setup, seed: int, watch: Watch
) -> tuple[dict[str, SiT], list[dict[str, Any]]]:
    """The teacher, and the students, which meet the same batches."""
    torch.manual_seed(seed)
    teacher = SiT(setup.digits(dense=True))
    student = new_student(setup.digits(), setup)
    few, _ = parted(parts["labelled"], setup.few, seed=seed)
    parts = parts | {"few": few}
    rows = [measured(TEACHER, Distilled(teacher), parts, setup, seed, watch)]
    students = {SCRATCH: Distilled(student.without_training_parts())}
    student.transplant(teacher)
    students[PLAIN] = Distilled(student.without_training_parts())
    for name, weights in LOSS.items():
        students[name] = Distilled(copy.deepcopy(student), teacher, **weights)
    for name, distilled in students.items():
        rows.append(measured(name, distilled, parts, setup, seed, watch))
    return {name: one.student for name, one in students.items()}, rows


def on_photographs(setup: Setup, seed: int, watch: Watch) -> tuple[SiT, dict[str, Any]]:
    """A student with FRD that knows two photographs; accuracy is that on pieces of the same."""
    begin, steps, images = time.perf_counter(), setup.photograph_steps, photographs(setup)
    torch.manual_seed(seed)
    teacher = SiT(setup.photographs(dense=True))
    student = new_student(setup.photographs(), setup)
    test = list(itertools.islice(pieces(images, setup, seed + 1), 16))
    found: dict[str, Any] = {"seed": seed, "pieces": sum(len(one.labels) for one in test)}

    def train(name: str, distilled: Distilled) -> None:
        def on_step(done: int) -> None:
            watch(f"photographs, {name}", done, steps)

        drawn = pieces(images, setup, seed)
        model = fit(distilled, drawn, steps, setup.student_lr, setup, on_step)
        found[name] = accuracy(model, test).top1

    train(TEACHER, Distilled(teacher))
    student.transplant(teacher)
    train(FRD, Distilled(student, teacher, **LOSS[FRD]))
    found["seconds"] = round(time.perf_counter() - begin, 1)
    return student, found


def run(setup: Setup, watch: Watch) -> tuple[dict[str, Any], dict[str, SiT]]:
    """The figures of all that is trained, and the last seed's student of digits with FRD, and that
    of photographs.
    """
    begin, load = time.perf_counter(), os.getloadavg()[0]
    parts, rows = digits(setup), []
    for seed in setup.seeds:
        students, more = one_seed(parts, setup, seed, watch)
        rows += more
    viewer, found = on_photographs(setup, setup.seeds[0], watch)
    result = {
        "machine": facts(),
        "load": {"before": load, "after": os.getloadavg()[0]},
        "seconds": round(time.perf_counter() - begin, 1),
        "setup": asdict(setup),
        "loss": LOSS,
        "macs": {
            "teacher": setup.digits(dense=True).macs(),
            "student": setup.digits().macs(),
        },
        "patches": [setup.digits().patches, *setup.digits().slim_after.values()],
        "runs": rows,
        "photographs": found,
    }
    return result, {"digits": students[FRD], "photographs": viewer}


def progress() -> tuple[Watch, Callable[[], None]]:
    """A bar per model where a terminal looks on, else a line per model; and what ends it."""
    from rich import progress as bar

    columns = (
        *(bar.TextColumn("{task.description}"), bar.BarColumn(), bar.MofNCompleteColumn()),
        *(bar.TimeElapsedColumn(), bar.TimeRemainingColumn()),
    )
    shown = bar.Progress(*columns)
    tasks: dict[str, bar.TaskID] = {}

    def watch(what: str, done: int, steps: int) -> None:
        if what not in tasks:
            tasks[what] = shown.add_task(what, total=steps)
        shown.update(tasks[what], completed=done)
        if done == steps and not shown.console.is_terminal:
            print(f"{what}: {steps} steps", flush=True)

    if shown.console.is_terminal:
        shown.start()
    return watch, shown.stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="the figures of the run, as JSON")
    parser.add_argument("--docs", type=Path, help="folder of the page and its pictures")
    parser.add_argument("--of", type=Path, help="a finished run's JSON: draws its page and curves")
    options = parser.parse_args()
    setup = Setup()
    if options.of:
        result, models = json.loads(options.of.read_text()), {}
    else:
        torch.set_num_threads(1)  # more gain nothing on products this small
        watch, end = progress()
        result, models = run(setup, watch)
        end()
    if options.out:
        text = json.dumps(result, indent=1)
        replace_file(options.out, lambda unfinished: unfinished.write_text(text + "\n"))
    if options.docs:
        options.docs.mkdir(parents=True, exist_ok=True)
        draw_curves(result, options.docs / "sit_digits_curves.png")
        if models:
            draw_all(models, setup, options.docs)
        text = page(result)
        replace_file(options.docs / "sit_digits.md", lambda file: file.write_text(text))
    print(table(result))


def draw_all(models: dict[str, SiT], setup: Setup, folder: Path) -> None:
    """The slots of the student of digits over four test digits, and of the other over a photograph
    of either kind.
    """
    test = digits(setup)["test"]
    chosen = torch.stack([test.images[test.labels == digit][0] for digit in (0, 3, 4, 8)])
    draw_assignments(
        models["digits"],
        chosen,
        folder / "sit_digits_slots.png",
        "Student with FRD, trained on digits, looks at digits of the test set",
    )
    draw_assignments(
        models["photographs"],
        photographs(setup),
        folder / "sit_photograph_slots.png",
        "Student with FRD, trained on pieces of these photographs, looks at them as a whole",
    )


if __name__ == "__main__":
    main()
