"""Student and teachers as one module: golden losses, the distillation token, recomputed blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sit_golden import SMALL, TINY, random_sit, tensors
from tokenmodels.sit import Distilled, SiT, SiTConfig, frd_losses, infer_config
from torch import Tensor, nn

DENSE = replace(TINY, dense=True)
DIST = replace(TINY, dist_token=True)


class Labels(nn.Module):
    """A convolutional teacher, as far as it matters: it has a batch norm and gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 16, stride=16), nn.BatchNorm2d(5)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)).mean((2, 3))


def test_golden_losses(folder: Path) -> None:
    """In one forward, in float64, in eval mode as there; no gradient for the teacher."""
    golden = np.load(folder / "lvvit_small_4c.npz")
    weights = {
        which: tensors(folder / f"lvvit_small_4c_{which}_sd.npz")
        for which in ("student", "teacher")
    }
    student = SiT.from_official(weights["student"], config=SMALL, training_parts=True)
    teacher = SiT.from_official(weights["teacher"], config=replace(SMALL, dense=True))
    images = torch.from_numpy(golden["img"]).double()
    labels = torch.from_numpy(golden["soft_labels"]).double()
    for temperature in (1, 2):
        distilled = Distilled(student.set_fused(False), teacher, temperature=temperature).double()
        assert not distilled.training
        losses = distilled(images, labels)
        want = golden[f"losses_tau{temperature}_f64"]
        np.testing.assert_allclose(torch.stack(losses).detach(), want, rtol=1e-9)
        losses.total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def _distilled(config: SiTConfig = DIST) -> Distilled:
    student, teacher = random_sit(config, training_parts=True), random_sit(DENSE)
    cnn = Labels() if config.dist_token else None
    return Distilled(student.train(), teacher, cnn_teacher=cnn, lambda_cnn=0.5)


def test_teachers_stay_as_they_are() -> None:
    """In eval mode whatever is asked of the module, their running statistics too."""
    distilled = _distilled()
    before = {k: v.clone() for k, v in distilled.state_dict().items() if "teacher" in k}
    for mode in (True, False, True):
        distilled.train(mode)
        assert distilled.student.training is mode
        assert not distilled.teacher.training and not distilled.cnn_teacher.norm.training
    distilled(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])).total.backward()
    for name, value in distilled.state_dict().items():
        assert name not in before or torch.equal(value, before[name]), name
    without = [n for n, p in distilled.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    trained = {n.split(".")[0] for n, p in distilled.named_parameters() if p.requires_grad}
    assert trained == {"student"}


def test_hard_labels_teach_the_second_head() -> None:
    """Its loss is the cross entropy with the CNN's labels; the others see the first head alone."""
    distilled, images = _distilled().eval(), torch.randn(4, 3, 64, 64)
    labels = torch.tensor([0, 4, 1, 1])
    got = distilled(images, labels)
    out = distilled.student(images, return_tokens=True)
    hard = distilled.cnn_teacher(images).argmax(-1)
    torch.testing.assert_close(got.cnn, 0.5 * F.cross_entropy(out.heads[1], hard))
    torch.testing.assert_close(got.cls, F.cross_entropy(out.heads[0], labels))
    teacher = distilled.teacher(images, return_tokens=True)
    tokens = distilled.student.training_parts(out.tokens)
    rest = frd_losses(out.heads[0], tokens, *teacher[::2], labels)
    torch.testing.assert_close(got[2:4], rest[2:4])
    torch.testing.assert_close(got.total, rest.total + got.cnn)


@torch.inference_mode()
def test_the_distillation_token() -> None:
    """It bypasses the slimmings; predictions are the mean of both heads, whatever the mode."""
    model, images = random_sit(DIST), torch.randn(2, 3, 64, 64)
    got = model(images, return_tokens=True)
    assert [x.shape[1] for x in got.tokens] == [8, 4, 4]
    assert torch.equal(got.logits, (got.heads[0] + got.heads[1]) / 2)
    assert torch.equal(model(images), got.logits)
    features = model.forward_features(images)
    assert features.shape == (2, 2 + 4, 16)
    assert torch.equal(model.head(features[:, 0]), got.heads[0])
    assert torch.equal(model.head_dist(features[:, 1]), got.heads[1])
    embedded = model.embed(images)
    first = torch.cat((model.cls_token + model.pos_embed[:, :1], model.dist_token), 1)
    first[:, 1] += model.dist_pos_embed[:, 0]
    torch.testing.assert_close(embedded[:, :2], first.expand(2, -1, -1))
    assert model.features_only(images)[0].shape == (2, 16, 4, 4)
    torch.testing.assert_close(model.fold_for_inference()(images), got.logits, atol=1e-5, rtol=0)
    assert model(torch.randn(1, 3, 80, 48)).shape == (1, 5)
    assert len(random_sit()(images, return_tokens=True).heads) == 1


def test_weights_with_a_distillation_token(tmp_path: Path) -> None:
    """Under the official names, in a folder; a teacher without leaves it as it was; the cost."""
    config = replace(DIST, embed_dim=64, num_heads=1)
    model = random_sit(config, training_parts=True)
    official = model.official_state_dict()
    names = {"dist_token", "dist_pos_embed", "head_dist.weight", "head_dist.bias"}
    assert names < official.keys() and official["pos_embed"].shape == (1, 17, 64)
    assert infer_config(official) == config
    images = torch.randn(1, 3, 64, 64)
    model.save_pretrained(tmp_path)
    for loaded in (SiT.from_official(official, config=config), SiT.from_pretrained(tmp_path)):
        assert torch.equal(loaded(images), model(images))
    left = model.transplant(random_sit(replace(config, dense=True, dist_token=False)))
    assert names < set(left)
    plain = replace(config, dist_token=False)
    width = 64
    extra = sum(
        4 * width**2 + 2 * 3 * width**2 + 2 * ((n + 2) ** 2 - (n + 1) ** 2) * width
        for n in (16, 8, 4)
    )
    assert config.macs() - plain.macs() == extra + width * 5


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_recomputed_blocks_give_the_same_gradients(drop_path: float) -> None:
    """Bit for bit, with the same branches left out."""
    config, images = replace(TINY, drop_path=drop_path), torch.randn(4, 3, 64, 64)
    gradients, kept = [], []
    for recompute in (False, True):
        distilled = _distilled(config)
        distilled.student.set_recompute(recompute)
        held: list[int] = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, held=held: held.append(x.numel()) or x, lambda x: x
        ):
            losses = distilled(images, torch.tensor([0, 1, 2, 3]))
        kept.append(sum(held))
        losses.total.backward()
        gradients.append([p.grad for p in distilled.student.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0]


def test_labels_alone() -> None:
    """Without a teacher, which is how a teacher is trained."""
    model, images = random_sit(DENSE).train(), torch.randn(4, 3, 64, 64)
    targets = torch.rand(4, 5).softmax(-1)
    got = Distilled(model)(images, targets)
    model.load_state_dict(random_sit(DENSE).state_dict())
    torch.testing.assert_close(got.total, F.cross_entropy(model(images), targets))
    assert got.total == got.cls and not any(got[2:])


def test_pairs_that_do_not_belong_together() -> None:
    parts, teacher = random_sit(training_parts=True), random_sit(DENSE)

    def refused(words: str, *models: SiT, **more: nn.Module) -> None:
        with pytest.raises(ValueError, match=f"Distilled: {words}"):
            Distilled(*models, **more)

    refused("teacher: allowed one, from which the student's training parts learn", parts)
    refused("teacher: allowed a dense SiT, got one that slims", parts, random_sit())
    refused("student: allowed one with training_parts=True", random_sit(), teacher)
    refused("student: allowed one that is not folded", parts.fold_for_inference(), teacher)
    narrow = random_sit(replace(DENSE, embed_dim=8))
    refused("teacher: allowed one with embed_dim=16, as the student, got 8", parts, narrow)
    other = random_sit(replace(DENSE, num_classes=4))
    refused("teacher: allowed one with num_classes=5, as the student, got 4", parts, other)
    refused(
        "cnn_teacher: allowed one if and only if .* False, got one", parts, cnn_teacher=Labels()
    )
    with_token = random_sit(DIST, training_parts=True)
    refused("cnn_teacher: allowed one if and only if .* True, got none", with_token, teacher)
    refused("student: allowed one with classes", random_sit(replace(DENSE, num_classes=0)))
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="frd_losses: dist_logits, cnn_logits: allowed both or"):
        frd_losses(logits, [], logits, [], torch.tensor([0, 1]), dist_logits=logits)
