"""Slimmed vision transformers that learn from what they were."""

from __future__ import annotations

import copy
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
    copied = copy.deepcopy(distilled)
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


def _with_slimming() -> Any:
    model = vit()
    slim(model)
    return model
