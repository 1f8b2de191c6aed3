"""What trains a SiT: recovery modules and distillation against golden numbers, stochastic depth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sit_golden import SMALL, TINY, random_sit, tensors
from tokenmodels._blocks import DropPath
from tokenmodels.sit import RecoverTokens, SiT, SiTConfig, SiTOutput, frd_losses
from tokenmodels.sit.checkpoint import official_name
from torch import Tensor


def _close(got: Tensor, want: np.ndarray, bound: float) -> None:
    torch.testing.assert_close(got, torch.from_numpy(want).to(got.dtype), atol=bound, rtol=0)


def test_recovery_module(folder: Path) -> None:
    want = np.load(folder / "rtsm_small.npz")
    module = RecoverTokens(48, 11, 22)
    weights = tensors(folder / "rtsm_small.npz")
    prefix = "sd/"
    module.load_state_dict(
        {
            key.removeprefix(prefix): value
            for key, value in weights.items()
            if key.startswith(prefix)
        }
    )
    _close(module(torch.from_numpy(want["x"])).detach(), want["y_f64"], 1e-5)
    x = torch.from_numpy(want["x"]).double().requires_grad_()
    y = module.double()(x)
    _close(y.detach(), want["y_f64"], 1e-12)
    (y * torch.from_numpy(want["dy"])).sum().backward()
    _close(x.grad, want["dx_f64"], 1e-11)
    for name, parameter in module.named_parameters():
        gradient = torch.from_numpy(want[f"grad_f64/{name}"])  # stored in float32
        torch.testing.assert_close(parameter.grad.float(), gradient, rtol=2.4e-7, atol=1e-10)


def _distilled(folder: Path) -> tuple[SiT, SiTOutput, SiTOutput, Tensor]:
    """The golden student's and its teacher's answers to the golden images, in float64."""
    golden = np.load(folder / "lvvit_small_4c.npz")
    student_weights, teacher_weights = (
        tensors(folder / f"lvvit_small_4c_{which}_sd.npz") for which in ("student", "teacher")
    )
    student = SiT.from_official(student_weights, config=SMALL, training_parts=True)
    teacher = SiT.from_official(teacher_weights, config=replace(SMALL, dense=True))
    images = torch.from_numpy(golden["img"]).double()
    student.double().set_fused(False)
    got = student(images, return_tokens=True)
    got = got._replace(tokens=tuple(student.training_parts(got.tokens)))
    labels = torch.from_numpy(golden["soft_labels"]).double()
    return student, got, teacher.double()(images, return_tokens=True), labels


def test_recovered_tokens_losses_and_gradients(folder: Path) -> None:
    golden = np.load(folder / "lvvit_small_4c.npz")
    student, got, teacher, labels = _distilled(folder)
    for i, tokens in enumerate(got.tokens):
        _close(tokens.detach(), golden[f"tokens_train_f64/{i}"], 1e-5)
    for temperature in (1, 2):
        losses = frd_losses(*got[::2], *teacher[::2], labels, temperature=temperature)
        want = golden[f"losses_tau{temperature}_f64"]
        np.testing.assert_allclose(torch.stack(losses).detach(), want, rtol=1e-9)
        if temperature == 1:
            losses.total.backward()
    norms = json.loads((folder / "lvvit_small_4c_gradnorms.json").read_text())
    seen = 0
    for name, parameter in student.named_parameters():
        want_norm = norms[official_name(name)]
        if parameter.requires_grad:
            got_norm = parameter.grad.norm().item()
            assert got_norm == pytest.approx(want_norm[0], rel=1e-9), name
            seen += 1
        else:  # the unused head, and biases whose gradient is zero but for rounding
            assert want_norm is None or want_norm[0] < 1e-15, name
    assert seen == len(norms) - 5


def test_fused_training_is_close_to_float64(folder: Path) -> None:
    """In float32 with the fused kernels: the same loss, the same gradients."""
    torch.manual_seed(0)
    model, images = random_sit(SMALL), torch.randn(2, 3, 96, 96)
    model(images).square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.double().set_fused(False)(images.double()).square().sum().backward()
    for name, gradient in got.items():
        want = model.get_parameter(name).grad
        assert (gradient - want).norm() <= 1e-4 * want.norm() + 1e-6, name


def test_bad_distillation() -> None:
    logits, tokens = torch.zeros(2, 5), [torch.zeros(2, 16, 8)] * 3
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"frd_losses: tokens: allowed those of 2 blocks.*, got 3"):
        frd_losses(logits, tokens, logits, tokens[:2], labels)
    with pytest.raises(
        ValueError, match=r"frd_losses: tokens: allowed \(2, 16, 8\) behind block 2"
    ):
        frd_losses(logits, [*tokens[:2], torch.zeros(2, 8, 8)], logits, tokens, labels)


def test_distillation_reaches_the_student_alone_in_any_dtype() -> None:
    """Labels may be indices; halves are widened; the teacher's tokens get no gradient."""
    torch.manual_seed(0)
    values = [torch.randn(2, 5), torch.randn(2, 4, 8), torch.randn(2, 5), torch.randn(2, 4, 8)]
    labels = torch.tensor([3, 1])
    want = frd_losses(values[0], [values[1]], values[2], [values[3]], labels)
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(
        frd_losses(values[0], [values[1]], values[2], [values[3]], one_hot), want
    )
    halves = [x.bfloat16().requires_grad_() for x in values]
    got = frd_losses(halves[0], [halves[1]], halves[2], [halves[3]], labels)
    assert all(x.dtype == torch.float32 for x in got)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    got.total.backward()
    assert [x.grad is None for x in halves] == [False, False, True, True]


def test_stochastic_depth() -> None:
    """Whole branches of single images, the mean kept; its rate rises with the block."""
    torch.manual_seed(0)
    x = torch.ones(4000, 3, 2)
    drop = DropPath(0.25)
    got = drop(x)
    assert sorted(set(got[:, 0, 0].tolist())) == pytest.approx([0, 4 / 3])
    assert torch.equal(got, got[:, :1, :1].expand_as(got))
    assert got.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x
    model = SiT(replace(TINY, drop_path=0.4))
    assert [b.drop_path.rate for b in model.blocks] == pytest.approx([0, 0.2, 0.4])
    images = torch.randn(8, 3, 64, 64)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_everything_trained_has_a_gradient() -> None:
    """No parameter is left without one, as distributed training wants it."""
    torch.manual_seed(0)
    student, images = SiT(TINY, training_parts=True), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        teacher = SiT(replace(TINY, dense=True)).eval()(images, return_tokens=True)
    got = student(images, return_tokens=True)
    tokens = student.training_parts(got.tokens)
    frd_losses(got.logits, tokens, *teacher[::2], torch.tensor([0, 1, 2, 3])).total.backward()
    without = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_a_step_of_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    student, images = SiT(TINY, training_parts=True), torch.randn(4, 3, 64, 64)
    teacher = random_sit(SiTConfig(**{**vars(TINY), "dense": True}))
    with torch.no_grad():
        wanted = teacher(images, return_tokens=True)
    student.transplant(teacher)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    totals = []
    for _ in range(8):
        got = student(images, return_tokens=True)
        tokens = student.training_parts(got.tokens)
        losses = frd_losses(got.logits, tokens, *wanted[::2], torch.tensor([0, 1, 2, 3]))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert totals[-1] < 0.9 * totals[0]
