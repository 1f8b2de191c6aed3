"""Slimmed vision transformers that learn from what they were."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from slim_hosts import HOSTS, hugging, images_of, lively, result, slimmed, vit
from tokenmodels.sit import DistilledViT, frd_losses, record_tokens, slim


@pytest.mark.parametrize("name", ["class token", "classifier"])
def test_distilled(native: None, name: str) -> None:
    """From a copy that is not slimmed: the losses, and who learns."""
    model = slimmed(name)[0]
    teacher = lively(HOSTS[name][0]())
    distilled = DistilledViT(model, teacher, lambda_token=3.0, temperature=2.0)
    assert list(distilled.recover) == ["0", "1", "2", "3"] and not distilled.training
    assert not distilled.train().teacher.training and model.training
    targets = torch.tensor([0, 1])
    losses = distilled(images_of(), targets)
    losses.total.backward()
    with record_tokens(model) as tokens:
        logits = result(model, images_of())
    with record_tokens(teacher) as dense:
        wanted = result(teacher, images_of())
    recovered = [distilled.recover[str(i)](one) for i, one in enumerate(tokens)]
    assert [one.shape[1] for one in recovered] == [16] * 4
    options = {"lambda_token": 3.0, "temperature": 2.0}
    want = frd_losses(logits, recovered, wanted, dense, targets, **options)
    torch.testing.assert_close(torch.stack(losses), torch.stack(want))
    assert losses.token > 0 and losses.logits > 0
    for key, value in distilled.named_parameters():
        learns = not key.startswith("teacher.") and not key.endswith("slims.0.fc2.bias")
        if key.endswith("slims.1.fc2.bias"):
            continue
        assert value.requires_grad == learns, key
        assert learns == (value.grad is not None), key
    for copied in (copy.deepcopy(distilled), pickle.loads(pickle.dumps(distilled))):
        torch.testing.assert_close(torch.stack(copied(images_of(), targets)), torch.stack(losses))
    assert not any(len(part._forward_hooks) > 1 for part in model.modules())


def test_wrong_pairs() -> None:
    student = vit()
    for given, text in (
        ((student, vit()), "student: allowed a slimmed one"),
        ((_with_slimming(), _with_slimming()), "teacher: allowed one not slimmed"),
        ((_with_slimming(), vit(embed_dim=64)), "teacher: allowed one with dim=32"),
        ((_with_slimming(), vit(reg_tokens=1)), "teacher: allowed one with prefix=1"),
        ((_with_slimming(), vit(img_size=64)), "teacher: allowed one with image_size"),
        ((_with_slimming(), vit(depth=2)), "teacher: allowed one of 4 blocks"),
    ):
        with pytest.raises(ValueError, match=f"DistilledViT: {text}"):
            DistilledViT(*given)
    model, teacher = hugging("ViTModel"), hugging("ViTModel")
    slim(model)
    with pytest.raises(TypeError, match="DistilledViT: output: allowed models that give logits"):
        DistilledViT(model, teacher)(images_of(), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"temperature": 0}, ValueError, "temperature: allowed above 0"),
        ({"lambda_token": "much"}, TypeError, "lambda_token: allowed a number"),
        ({"lambda_logits": -1.0}, ValueError, "lambda_logits: allowed 0 or above"),
    ],
    ids=str,
)
def test_wrong_weights(given: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"DistilledViT: {text}"):
        DistilledViT(_with_slimming(), vit(), **given)


def test_wrong_forwards(native: None) -> None:
    targets = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"teacher: allowed one that gives \(2, 5\) logits"):
        DistilledViT(_with_slimming(), vit(num_classes=7))(images_of(), targets)
    student = _with_slimming()
    distilled = DistilledViT(student, vit())
    student.slimming.remove()
    with pytest.raises(ValueError, match="DistilledViT: student: allowed a slimmed one"):
        distilled(images_of(), targets)


def test_recomputed_activations(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only in a way that gives the tokens gradients."""
    distilled, targets = DistilledViT(_with_slimming(), vit()).train(), torch.tensor([0, 1])
    want = distilled(images_of(), targets)
    distilled.student.set_grad_checkpointing()
    torch.testing.assert_close(torch.stack(distilled(images_of(), targets)), torch.stack(want))
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: True)
    with pytest.raises(ValueError, match=r"student: allowed .*use_reentrant=False"):
        distilled(images_of(), targets)
    monkeypatch.undo()
    with torch.no_grad():
        distilled(images_of(), targets)
    distilled.student.requires_grad_(False)
    distilled(images_of(), targets).total.backward()


def test_as_many_slots_as_patches(native: None) -> None:
    """Slots are no patches even then: what compares them with the teacher's is there."""
    model = vit()
    slim(model, stages=(2, 2), keep=1.0)
    distilled = DistilledViT(model, vit())
    assert list(distilled.recover) == ["1", "2", "3"]
    distilled(images_of(), torch.tensor([0, 1])).total.backward()
    assert all(value.grad is not None for value in distilled.recover.parameters())


def _with_slimming() -> Any:
    model = vit()
    slim(model)
    return model
