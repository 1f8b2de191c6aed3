"""A training run: steps, evaluations, and checkpoints from which it goes on as if never stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokenmodels._average import Average
from tokenmodels._data.images import open_images
from tokenmodels._data.mixing import mix
from tokenmodels._data.order import Batches
from tokenmodels._data.transforms import training_transform
from tokenmodels._files import Checkpoints, Lock
from tokenmodels._log import Log
from tokenmodels._options import differences
from tokenmodels._processes import Processes
from tokenmodels._refuse import refusal
from tokenmodels._seeds import mixed
from tokenmodels.sit.distillation import FRDLosses
from tokenmodels.sit.evaluate import (
    Accuracy,
    accuracy,
    evaluation_loader,
    height_width,
    require_classes,
)
from tokenmodels.sit.model import SiT
from tokenmodels.sit.recipe import Recipe, parameter_groups
from tokenmodels.sit.teachers import build

FREE = {
    *("data.train", "data.val", "data.workers", "distil.teacher", "distil.cnn_teacher"),
    *("run.out", "run.device", "run.recompute", "run.save_every", "run.keep", "run.log_every"),
    "run.eval_every",
}
"""What may be other than it was when a run goes on: where things are, and how often it reports."""


class Training:
    """A run, ready to begin, or to go on behind the newest checkpoint in `run.out`.

    Nothing that is random depends on what was drawn before: the order of images on (seed, epoch),
    an image's augmentation on its place in it, mixing and stochastic depth on (seed, step, rank).
    So the step, the weights, the optimiser's state, the average and the gradient scale are all that
    a run has to remember, and on a CPU with the same number of threads it goes on bit for bit.

    Args:
        recipe: what is trained, how, on what.
        processes: those of the run; one on the CPU if not given.

    Raises:
        ValueError: data or teachers that do not fit the recipe; a folder that holds a run of
            another recipe.
        FileNotFoundError: data or teachers that are not there.
        Busy: another process is training into the folder.

    Attributes:
        student: the network that is trained.
        average: its moving average, or None.
        done: steps that lie behind.
        total: steps of the whole run.
        results: per evaluation, (step, name of the weights, accuracy); of this process's life.

    Example:
        >>> recipe = Recipe.of({"model": {"variant": "sit_tiny"}, "data": {"train": "images"}})
        >>> student = Training(recipe).run()  # doctest: +SKIP
    """

    def __init__(self, recipe: Recipe, processes: Processes | None = None) -> None:
        self.recipe, self.processes = recipe, processes or Processes()
        self.results: list[tuple[int, str, Accuracy]] = []
        self._open_data()
        self._open_models()
        self._open_folder()

    def _open_data(self) -> None:
        recipe, at = self.recipe, self.processes
        if not recipe.data.train:
            allowed = "a folder of a folder per class, or tar shards"
            raise ValueError(refusal("config", "data.train", allowed, "nothing"))
        size = height_width(recipe.model)
        images = open_images(recipe.data.train, training_transform(size, recipe.augment))
        require_classes(images, recipe.model, recipe.data.train)
        self.images = len(images)
        self.batches = Batches(
            self.images,
            recipe.optim.batch_size,
            seed=recipe.run.seed,
            repeats=recipe.augment.repeats,
            rank=at.rank,
            world=at.world,
        )
        self.total = self.batches.steps * recipe.optim.all_epochs
        self.loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=self.batches,
            num_workers=recipe.data.workers,
            pin_memory=at.device.type == "cuda",
            persistent_workers=recipe.data.workers > 0,
        )
        self.val = None
        if recipe.data.val:
            self.val = evaluation_loader(
                recipe.data.val,
                recipe.model,
                at,
                batch_size=max(1, 3 * recipe.optim.batch_size // 2),
                workers=recipe.data.workers,
                crop=recipe.data.crop,
            )

    def _open_models(self) -> None:
        run, optim, at = self.recipe.run, self.recipe.optim, self.processes
        self.distilled = build(self.recipe).to(at.device)
        self.student: SiT = self.distilled.student
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.student, optim), betas=optim.betas, eps=optim.eps
        )
        self.scaler = torch.amp.GradScaler(at.device.type, enabled=run.precision == "fp16")
        self.average = Average(self.student, decay=run.average) if run.average else None
        self.module: nn.Module = self.distilled
        if at.world > 1:
            devices = [at.device] if at.device.type == "cuda" else None
            self.module = nn.parallel.DistributedDataParallel(self.distilled, device_ids=devices)

    def _open_folder(self) -> None:
        """Takes the folder, and what the newest checkpoint in it holds."""
        run, at = self.recipe.run, self.processes
        self.folder = Path(run.out)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=run.keep)
        self.lock = Lock(self.folder) if at.leads else None
        if at.leads:
            self.checkpoints.remove_unfinished()
        at.wait()
        found = self.checkpoints.latest()
        self.done, state = (0, None) if found is None else found
        if not at.same(self.done):
            got = f"{self.folder}, which not all processes see"
            raise ValueError(refusal("config", "run.out", "a folder that all share", got))
        self.best = -1.0
        if state is not None:
            self._require_same_run(state)
            self._restore(state)
        self._forget_losses()

    def _require_same_run(self, state: dict[str, Any]) -> None:
        """Raises unless the checkpoint is of this recipe."""
        now = self._marks()
        found = differences(state["marks"], now)
        if changed := {name: pair for name, pair in found.items() if name not in FREE}:
            told = "; ".join(f"{name} {old!r}, now {new!r}" for name, (old, new) in changed.items())
            allowed = "the folder of the same run, or another one for a new run"
            raise ValueError(refusal("config", "run.out", allowed, f"{self.folder} with {told}"))

    def _marks(self) -> dict[str, Any]:
        """What the steps that lie behind depended on."""
        return self.recipe.table() | {"processes": self.processes.world, "images": self.images}

    def state(self) -> dict[str, Any]:
        """All that a run has to remember."""
        return {
            "marks": self._marks(),
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.model.state_dict() if self.average else None,
            "best": self.best,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.model.load_state_dict(state["average"])
        self.best = state["best"]

    def run(self, *, on_step: Callable[[Training], None] | None = None) -> SiT:
        """Trains to the end, and leaves the weights in `run.out`: `last`, `best` and `average`.

        Args:
            on_step: is called behind every step, and behind its checkpoint.

        Returns:
            The student, in eval mode.

        Raises:
            FloatingPointError: the loss is no longer a number.
        """
        log = Log(self.folder, total=self.total, done=self.done, speaks=self.processes.leads)
        try:
            if self.done < self.total:
                log.say(self._introduction())
            while self.done < self.total:
                self._epoch(log, on_step)
            self._keep_weights("last", self.student)
            if self.average:
                self._keep_weights("average", self.average.model)
            log.say(f"{self.total} steps are done; the weights are in {self.folder / 'last'}")
        finally:
            log.close()
        return self.student.eval()

    def _introduction(self) -> str:
        at, taught = self.processes, self.recipe.distil.teacher or "the labels alone"
        epoch = self.done // self.batches.steps
        return (
            f"from step {self.done} (epoch {epoch}) to {self.total}, on {at.world} × {at.device}, "
            f"{self.recipe.run.precision}, {self.images} images, taught by {taught}"
        )

    def _epoch(self, log: Log, on_step: Callable[[Training], None] | None) -> None:
        """What is left of the epoch, its evaluation and its checkpoint."""
        run, optim = self.recipe.run, self.recipe.optim
        epoch, step = divmod(self.done, self.batches.steps)
        images = optim.batch_size * self.processes.world
        for group in self.optimizer.param_groups:
            group["lr"] = optim.rate(epoch, optim.peak(images, group["factor"]))
        self.batches.begin(epoch, step)
        self.distilled.train()
        self._forget_losses()
        for pictures, labels in self.loader:
            self._step(pictures, labels)
            self.done += 1
            log.advance(self.done)
            if self.done % run.log_every == 0:
                log.tell(self.done, self._figures(epoch))
            if self.done % self.batches.steps == 0:
                self._evaluate(log, epoch)
                self.save()
            elif self.done % run.save_every == 0:
                self.save()
            if on_step is not None:
                on_step(self)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        recipe, at = self.recipe, self.processes
        place = (recipe.run.seed, self.done, at.rank)
        torch.manual_seed(mixed("step", *place))
        images = images.to(at.device, non_blocking=True)
        labels = labels.to(at.device, non_blocking=True)
        classes, seed = recipe.model.num_classes, mixed("mix", *place)
        images, targets = mix(images, labels, classes, recipe.augment, seed=seed)
        with at.autocast(recipe.run.precision):
            losses: FRDLosses = self.module(images, targets)
        self.scaler.scale(losses.total).backward()
        if recipe.optim.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.student.parameters(), recipe.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.student)
        self.losses += torch.stack(losses).detach()
        self.counted += 1

    def _forget_losses(self) -> None:
        self.losses = torch.zeros(len(FRDLosses._fields), device=self.processes.device)
        self.counted, self.since = 0, time.perf_counter()

    def _figures(self, epoch: int) -> dict[str, float]:
        """Mean losses since they were last asked for, over all processes; rate and speed."""
        sums = self.processes.sum([*self.losses.tolist(), self.counted])
        *losses, count = sums
        speed = count * self.recipe.optim.batch_size / (time.perf_counter() - self.since)
        self._require_finite()
        self._forget_losses()
        names = ("loss", *FRDLosses._fields[1:])
        means = {name: value / count for name, value in zip(names, losses, strict=True)}
        rate = self.optimizer.param_groups[-1]["lr"]
        return {"epoch": epoch, **means, "lr": rate, "images_per_second": speed}

    def _require_finite(self) -> None:
        if not torch.isfinite(self.losses).all():
            losses = dict(zip(FRDLosses._fields, self.losses.tolist(), strict=True))
            text = refusal("Training", "loss", "numbers", f"{losses} at step {self.done}")
            raise FloatingPointError(text)

    def save(self) -> None:
        """Writes a checkpoint; returns when it is on the disk. The first process alone writes."""
        self._require_finite()
        if self.processes.leads:
            self.checkpoints.save(self.done, self.state())

    def _evaluate(self, log: Log, epoch: int) -> None:
        due = (epoch + 1) % self.recipe.run.eval_every == 0 or self.done == self.total
        if self.val is None or not due:
            return
        models: dict[str, SiT] = {"student": self.student.eval()}
        if self.average:
            models["average"] = self.average.model  # type: ignore[assignment]
        self.processes.share_buffers(*models.values())
        for name, model in models.items():
            got = accuracy(
                model, self.val, processes=self.processes, precision=self.recipe.run.precision
            )
            self.results.append((self.done, name, got))
            log.tell(self.done, {f"{name}_{k}": v for k, v in got._asdict().items()})
            if got.top1 > self.best:
                self.best = got.top1
                self._keep_weights("best", model)
        self.distilled.train()

    def _keep_weights(self, name: str, model: SiT | nn.Module) -> None:
        """As a folder that `SiT.from_pretrained` reads, without training parts."""
        assert isinstance(model, SiT)
        if self.processes.leads:
            model.without_training_parts().save_pretrained(self.folder / name)
