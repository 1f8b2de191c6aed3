"""The official recipe: its figures exactly; how files and commands change it; what is refused."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sit_golden import TINY, random_sit
from tokenmodels._options import add_arguments, given, merged, read_table
from tokenmodels.sit import VARIANTS, Recipe, SiT, parameter_groups


def test_rates() -> None:
    """With eight processes of 128 images; recovery modules five times as high, then all alike."""
    optim = Recipe().optim
    assert optim.all_epochs == 135
    base, recover = optim.peak(8 * 128), optim.peak(8 * 128, optim.recover_factor)
    epochs = (0, 1, 62, 124, 125, 134)
    assert [f"{optim.rate(epoch, base):.3e}" for epoch in epochs] == [
        *("4.000e-04", "3.999e-04", "2.075e-04", "1.006e-05", "1.000e-05", "1.000e-05")
    ]
    assert [f"{optim.rate(epoch, recover):.4e}" for epoch in epochs] == [
        *("2.0000e-03", "1.9997e-03", "1.0175e-03", "1.0314e-05", "1.0000e-05", "1.0000e-05")
    ]


def test_parameter_groups() -> None:
    """Of the tiny variant: order, tensors and numbers; everything that is trained is in one."""
    with torch.device("meta"):
        model = SiT(VARIANTS["sit_tiny"], training_parts=True)
    groups = parameter_groups(model, Recipe().optim)
    got = [(g["name"], len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups]
    assert got == [
        ("rtsm", 168, 14_015_176),
        ("base_no_decay", 123, 109_091),
        ("base_decay", 70, 15_442_843),
    ]
    assert [(g["weight_decay"], g["factor"]) for g in groups] == [(0.05, 5), (0, 1), (0.05, 1)]
    grouped = {id(p) for g in groups for p in g["params"]}
    assert len(grouped) == 168 + 123 + 70
    assert all(id(p) in grouped for p in model.parameters() if p.requires_grad)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in groups[2]["params"]}
    assert {"slims.0.logit_scale", "stem.convs.0.weight", "head.weight"} < decayed


def test_parameter_groups_of_others() -> None:
    """A teacher has no recovery group; a distillation token and its position do not decay."""
    config = replace(TINY, dist_token=True, dense=True)
    model = SiT(config)
    groups = parameter_groups(model, Recipe().optim)
    assert [g["name"] for g in groups] == ["base_no_decay", "base_decay"]
    names = {id(p): name for name, p in model.named_parameters()}
    plain = {names[id(p)] for p in groups[0]["params"]}
    assert {"dist_token", "dist_pos_embed", "cls_token", "pos_embed", "head_dist.bias"} <= plain
    assert "head_dist.weight" not in plain


@pytest.mark.parametrize("name", VARIANTS)
def test_official_options(name: str) -> None:
    recipe = Recipe.of({"model": {"variant": name}})
    large, tiny = name == "sit_large", name == "sit_tiny"
    assert replace(recipe.model, drop_path=0.0) == VARIANTS[name]
    assert recipe.model.drop_path == (0.3 if large else 0.0 if tiny else 0.1)
    assert recipe.augment.auto_augment == f"rand-{'n3-' * large}m9-mstd0.5-inc1"
    assert recipe.run.recompute == large and not recipe.run.average
    mixing = recipe.augment
    assert (mixing.repeats, mixing.mixup, mixing.cutmix, mixing.smoothing) == (3, 0.8, 1.0, 0.1)
    assert (mixing.erase, mixing.mix, mixing.switch, mixing.color_jitter) == (0.25, 1, 0.5, 0.4)
    distil, optim = recipe.distil, recipe.optim
    assert (distil.lambda_token, distil.lambda_logits, distil.temperature) == (2, 2, 1)
    assert (optim.lr, optim.batch_size, optim.weight_decay, optim.clip) == (2e-4, 128, 0.05, None)
    assert (optim.betas, optim.eps, optim.min_lr) == ((0.9, 0.999), 1e-8, 1e-5)
    assert Recipe.of(recipe.table()) == recipe == Recipe.of(json.loads(json.dumps(recipe.table())))


def test_files_and_commands(tmp_path: Path) -> None:
    """TOML and JSON say the same; the command line goes before both; the rest is the variant's."""
    toml, other = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text('[model]\nvariant = "sit_large"\nimage_size = [256, 224]\n[optim]\nlr = 1\n')
    other.write_text(
        '{"model": {"variant": "sit_large", "image_size": [256, 224]},"optim":{"lr":1}}'
    )
    assert read_table(toml) == read_table(other)
    parser = argparse.ArgumentParser()
    add_arguments(parser, Recipe())
    words = ["--optim.lr", "1e-3", "--model.keep", "[100, 50, 20]", "--run.out", "1"]
    words += ["--optim.clip", "1", "--distil.from_teacher", "false"]
    recipe = Recipe.of(merged(read_table(toml), given(parser.parse_args(words), Recipe())))
    assert recipe.model.image_size == (256, 224) and recipe.model.keep == (100, 50, 20)
    assert (recipe.optim.lr, recipe.optim.clip, recipe.run.out) == (1e-3, 1.0, "1")
    assert not recipe.distil.from_teacher and recipe.model.drop_path == 0.3
    text = parser.format_help()
    assert "how many times higher the rate of the recovery modules begins. (5.0)" in " ".join(
        text.split()
    )


BAD = [
    ({"model": {"variant": "sit_huge"}}, "model.variant: allowed sit_tiny, .* got 'sit_huge'"),
    ({"optom": {}}, "name: allowed model, optim, .* got optom"),
    ({"optim": {"lrr": 1}}, r"name: allowed optim.\{lr, .*\}, got optim.lrr"),
    ({"optim": {"epochs": 0}}, "optim.epochs: allowed 1 or more, got 0"),
    ({"optim": {"lr": float("nan")}}, "optim.lr: allowed 0 or more, got nan"),
    ({"optim": {"clip": 0}}, "optim.clip: allowed above 0, or null, got 0.0"),
    ({"distil": {"temperature": 0}}, "distil.temperature: allowed above 0, got 0.0"),
    ({"augment": {"mixup": -1}}, "augment.mixup: allowed 0 or more, got -1.0"),
    ({"augment": {"erase": 2}}, "augment.erase: allowed 0 to 1, got 2.0"),
    ({"augment": {"scale": [1, 0.5]}}, r"augment.scale: allowed \[from, to\], above 0"),
    ({"augment": {"repeats": 0}}, "augment.repeats: allowed 1 or more, got 0"),
    ({"data": {"workers": -1}}, "data.workers: allowed 0 or more, got -1"),
    ({"data": {"crop": 0}}, "data.crop: allowed above 0 up to 1, got 0.0"),
    ({"run": {"save_every": 0}}, "run.save_every: allowed 1 or more, got 0"),
    ({"run": {"average": 1}}, "run.average: allowed 0 to below 1, got 1.0"),
    ({"model": {"num_classes": 0}}, "model: allowed classes, and three channels, got 0 classes"),
    (
        {"distil": {"cnn_teacher": "timm:x"}},
        "distil.cnn_teacher: allowed both or neither .* only it",
    ),
    ({"model": {"dist_token": True}}, "distil.cnn_teacher: allowed both .* only model.dist_token"),
]


@pytest.mark.parametrize(("table", "words"), BAD, ids=[str(table) for table, _ in BAD])
def test_bad_values(table: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"^config: {words}"):
        Recipe.of(table)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"optim": 3}, "optim: allowed a section, got 3"),
        ({"model": []}, r"model: allowed a section, got \[\]"),
        ({"optim": {"lr": "a"}}, "optim.lr: allowed float, got 'a'"),
        ({"optim": {"epochs": True}}, "optim.epochs: allowed int, got True"),
        ({"augment": {"scale": [1]}}, r"augment.scale: allowed \[float, float\], got \[1\]"),
        ({"run": {"recompute": 1}}, "run.recompute: allowed true or false, got 1"),
        ({"run": {"precision": "fp8"}}, "run.precision: allowed bf16 or fp16 or fp32, got 'fp8'"),
        ({"model": {"image_size": "x"}}, r"model.image_size: allowed int or \[int, int\], got 'x'"),
    ],
    ids=str,
)
def test_values_of_another_type(table: dict, words: str) -> None:
    with pytest.raises(TypeError, match=f"^config: {words}"):
        Recipe.of(table)


def test_recipe_and_model_agree() -> None:
    """A small network of one's own; a dense one needs no stages."""
    shape = {"embed_dim": 16, "depth": 3, "num_heads": 2, "image_size": 64, "num_classes": 5}
    student = Recipe.of({"model": {**shape, "stages": [1, 1, 1], "drop_path": 0}})
    assert student.model == TINY == random_sit().config
    dense = Recipe.of({"model": {**shape, "dense": True}})
    assert dense.model.dense and dense.model.stages == (3,)
