"""The official recipe as the default options, its parameter groups and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import nn

from tokenmodels._data.transforms import Augmentation
from tokenmodels._options import Table, changed
from tokenmodels._refuse import refusal
from tokenmodels.sit.config import VARIANTS, SiTConfig
from tokenmodels.sit.model import SiT


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW, and a cosine that is constant within an epoch.

    Attributes:
        lr: of 512 images per step; the true one is in proportion to the images of all processes.
        batch_size: images per process and step.
        epochs: over which the rate falls.
        cooldown: further epochs at the lowest rate.
        min_lr: the lowest rate, which is not scaled.
        recover_factor: how many times higher the rate of the recovery modules begins.
        weight_decay: of all recovery parameters; elsewhere neither of vectors nor of tokens.
        betas: of AdamW.
        eps: of AdamW.
        clip: largest norm of all gradients together; null for any.
    """

    lr: float = 2e-4
    batch_size: int = 128
    epochs: int = 125
    cooldown: int = 10
    min_lr: float = 1e-5
    recover_factor: float = 5.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(
                    refusal("config", f"optim.{name}", "1 or more", getattr(self, name))
                )
        for name in ("lr", "min_lr", "cooldown", "recover_factor", "weight_decay", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    refusal("config", f"optim.{name}", "0 or more", getattr(self, name))
                )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(refusal("config", "optim.clip", "above 0, or null", self.clip))

    @property
    def all_epochs(self) -> int:
        """Epochs that are run."""
        return self.epochs + self.cooldown

    def peak(self, images_per_step: int, factor: float = 1.0) -> float:
        """The rate of the first epoch.

        Example:
            >>> Optimisation().peak(8 * 128)
            0.0004
        """
        return self.lr * images_per_step / 512 * factor

    def rate(self, epoch: int, peak: float) -> float:
        """The rate of an epoch.

        Example:
            >>> [f"{Optimisation().rate(epoch, 4e-4):.3e}" for epoch in (0, 62, 125)]
            ['4.000e-04', '2.075e-04', '1.000e-05']
        """
        if epoch >= self.epochs:
            return self.min_lr
        share = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.min_lr + share * (peak - self.min_lr)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """From whom the student learns beside the labels, and how much each loss counts.

    Attributes:
        teacher: a dense SiT: a folder of `save_pretrained`, or a file of the official code; "" for
            none.
        from_teacher: whether the student begins with the teacher's weights.
        cnn_teacher: what teaches `model.dist_token`: "timm:" and a name, or as `teacher`; "" for
            none.
        lambda_token: weight of the recovered tokens' squared error.
        lambda_logits: weight of the divergence from the teacher's classes.
        lambda_cnn: weight of the labels of `cnn_teacher`.
        temperature: by which the logits are divided there.
    """

    teacher: str = ""
    from_teacher: bool = True
    cnn_teacher: str = ""
    lambda_token: float = 2.0
    lambda_logits: float = 2.0
    lambda_cnn: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(refusal("config", "distil.temperature", "above 0", self.temperature))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images are, and how they are read.

    Attributes:
        train: a folder of a folder per class, or tar shards: `train-{000..146}.tar`.
        val: the same, for evaluation; "" for none.
        workers: processes that read and augment, beside each of those that train.
        crop: share of the resized short side that evaluation keeps.
    """

    train: str = ""
    val: str = ""
    workers: int = 8
    crop: float = 224 / 256

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(refusal("config", "data.workers", "0 or more", self.workers))
        if not 0 < self.crop <= 1:
            raise ValueError(refusal("config", "data.crop", "above 0 up to 1", self.crop))


@dataclass(frozen=True, kw_only=True)
class Run:
    """How and where it runs; nothing here but `seed` and `precision` changes what is learnt.

    Attributes:
        out: the folder of checkpoints, logs and results. The same command run again goes on there.
        seed: all that is random depends on it.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        precision: "bf16" and "fp16" by autocast, the latter with scaled gradients, or "fp32".
        recompute: keeps less memory and computes blocks again for the gradients.
        average: decay of a moving average of the weights, which is evaluated too; 0 for none.
        save_every: steps between checkpoints; one more is written behind every epoch.
        keep: checkpoints that are kept.
        log_every: steps between lines of the log.
        eval_every: epochs between evaluations; the last is always evaluated.
    """

    out: str = "runs/sit"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    recompute: bool = False
    average: float = 0.0
    save_every: int = 500
    keep: int = 2
    log_every: int = 50
    eval_every: int = 1

    def __post_init__(self) -> None:
        for name in ("save_every", "keep", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(refusal("config", f"run.{name}", "1 or more", getattr(self, name)))
        if not 0 <= self.average < 1:
            raise ValueError(refusal("config", "run.average", "0 to below 1", self.average))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a training run depends on. The defaults are those of the released models.

    Source: the training scripts of the released SiT models.

    Example:
        >>> recipe = Recipe.of({"model": {"variant": "sit_large"}, "optim": {"epochs": 30}})
        >>> recipe.model.image_size, recipe.model.drop_path, recipe.optim.all_epochs
        (288, 0.3, 40)
    """

    model: SiTConfig = field(default_factory=lambda: replace(VARIANTS["sit_small"], drop_path=0.1))
    optim: Optimisation = field(default_factory=Optimisation)
    distil: Distillation = field(default_factory=Distillation)
    augment: Augmentation = field(default_factory=Augmentation)
    data: Data = field(default_factory=Data)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        model, distil = self.model, self.distil
        if model.dist_token != bool(distil.cnn_teacher):
            allowed = "both or neither of it and model.dist_token"
            got = "only it" if distil.cnn_teacher else "only model.dist_token"
            raise ValueError(refusal("config", "distil.cnn_teacher", allowed, got))
        if distil.cnn_teacher and not distil.teacher:
            raise ValueError(refusal("config", "distil.teacher", "one beside cnn_teacher", "none"))
        if model.num_classes < 1 or model.in_channels != 3:
            got = f"{model.num_classes} classes, {model.in_channels} channels"
            raise ValueError(refusal("config", "model", "classes, and three channels", got))

    @classmethod
    def official(cls, variant: str) -> Recipe:
        """What a released network was trained by; who its teacher is remains to be said.

        Raises:
            ValueError: no such variant.
        """
        if variant not in VARIANTS:
            allowed = ", ".join(VARIANTS)
            raise ValueError(refusal("config", "model.variant", allowed, repr(variant)))
        drop_path = {"sit_tiny": 0.0, "sit_large": 0.3}.get(variant, 0.1)
        recipe = cls(model=replace(VARIANTS[variant], drop_path=drop_path))
        if variant != "sit_large":
            return recipe
        stronger = replace(recipe.augment, auto_augment="rand-n3-m9-mstd0.5-inc1")
        return replace(recipe, augment=stronger, run=replace(recipe.run, recompute=True))

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Recipe:
        """A recipe from what a TOML or JSON file has, section by section.

        `model.variant` names the released network whose recipe is the default for all else, the
        small one if it is not there.

        Raises:
            ValueError: unknown names, or values that do not fit together.
            TypeError: values of another type.
        """
        model = table.get("model", {})
        if not isinstance(model, Mapping):
            raise TypeError(refusal("config", "model", "a section", repr(model)))
        rest = {name: value for name, value in model.items() if name != "variant"}
        if rest.get("dense") and "depth" in rest:
            rest.setdefault("stages", [])  # the variant's need not fit, and nothing reads them
        return changed(cls.official(model.get("variant", "sit_small")), {**table, "model": rest})

    def table(self) -> Table:
        """All options as nested dicts of plain values."""
        return asdict(self)


def parameter_groups(model: SiT, optim: Optimisation) -> list[dict[str, Any]]:
    """The official groups for AdamW: recovery modules, what does not decay, what does.

    Logit scales decay, and so do the recovery modules' biases and norms, as officially. The slot
    projections' biases are among what does not decay; they have no gradient, so nothing moves them.

    Returns:
        Per group `name`, `params`, `weight_decay`, and `factor`, by which its rate is higher; empty
        ones are left out.
    """
    groups: dict[str, list[nn.Parameter]] = {"rtsm": [], "base_no_decay": [], "base_decay": []}
    tokens = ("cls_token", "pos_embed", "dist_token", "dist_pos_embed")
    for name, parameter in model.named_parameters():
        if name.startswith("training_parts.recover."):
            groups["rtsm"].append(parameter)
        elif not name.startswith("training_parts."):
            plain = name in tokens or parameter.ndim == 1 or name.endswith(".bias")
            groups["base_no_decay" if plain else "base_decay"].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": 0.0 if name == "base_no_decay" else optim.weight_decay,
            "factor": optim.recover_factor if name == "rtsm" else 1.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]
