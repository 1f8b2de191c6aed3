"""The example that trains on digits: it learns, repeats itself, and its page is of its figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenmodels.sit import SlimTokens

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "bench" / "results" / "sit-digits-cpu.json"
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import sit_digits
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return sit_digits


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the example has it: sums of another order have other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(what: str, done: int, steps: int) -> None:
    pass


def test_parts_are_disjoint_and_have_all_classes(example: ModuleType) -> None:
    setup = example.Setup()
    parts = example.digits(setup)
    few, rest = example.parted(parts["labelled"], setup.few, seed=1)
    assert len(few.labels) == setup.few and len(rest.labels) == setup.labelled - setup.few
    assert sum(len(part.labels) for part in parts.values()) == 1797
    pixels = torch.cat([part.images.flatten(1) for part in parts.values()])
    assert len(pixels.unique(dim=0)) == 1797, "an image is in two parts"
    for part in (*parts.values(), few):
        counts = part.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 0.1 * len(part.labels) / 2
        assert part.images.min() == -1 and part.images.max() == 1


def test_students_learn(example: ModuleType) -> None:
    """With fewer steps: far above chance (10 %), the student with FRD not far below."""
    setup = replace(
        example.Setup(), test=400, validation=50, teacher_steps=120, student_steps=40, points=1
    )
    students, rows = example.one_seed(example.digits(setup), setup, 0, quiet)
    test = {row["model"]: row["test"] for row in rows}
    assert list(test) == [example.TEACHER, example.SCRATCH, example.PLAIN, *example.LOSS]
    assert test[example.TEACHER] > 70
    assert test[example.FRD] > test[example.TEACHER] - 10
    assert test[example.FRD] > test[example.SCRATCH]
    assert students[example.FRD].config.slim_after == {1: 8, 3: 4, 4: 2}
    for row in rows:
        assert row["curve"][-1][0] == (120 if row["model"] == example.TEACHER else 40)


@pytest.fixture(scope="module")
def small(example: ModuleType, one_thread: None) -> tuple:
    """All of it in a few steps, and what it trained."""
    setup = replace(
        example.Setup(),
        **dict(seeds=(0, 1), validation=50, test=80, labelled=100, few=40, photograph_size=64),
        **dict(teacher_steps=4, student_steps=3, photograph_steps=1, batch_size=16, points=1),
    )
    return setup, *example.run(setup, quiet)


def test_the_same_seed_gives_the_same_figures(example: ModuleType, small: tuple) -> None:
    """Accuracies and weights, to the last bit; another seed gives others."""
    setup, result, models = small
    again, same = example.run(setup, quiet)

    def figures(run: dict) -> list:
        return [(row["seed"], row["model"], row["test"], row["curve"]) for row in run["runs"]]

    assert figures(again) == figures(result)
    for name, model in models.items():
        for weight, other in zip(model.parameters(), same[name].parameters(), strict=True):
            assert torch.equal(weight, other)
    other, _ = example.one_seed(example.digits(setup), setup, 0, quiet)
    assert not torch.equal(other[example.FRD].head.weight, models["digits"].head.weight)


def test_compared_students_begin_alike(example: ModuleType, monkeypatch) -> None:
    """With the teacher's weights, the same slots and the same images."""
    setup = replace(example.Setup(), teacher_steps=1, student_steps=1, test=50, batch_size=8)
    begun, met = {}, {}

    def measured(name, distilled, parts, *others):
        weights = distilled.student.without_training_parts().state_dict()
        begun[name] = {key: value.clone() for key, value in weights.items()}
        met[name] = parts["few"].labels
        return real(name, distilled, parts, *others)

    real = example.measured
    monkeypatch.setattr(example, "measured", measured)
    example.one_seed(example.digits(setup), setup, 0, quiet)
    for name in example.LOSS:
        assert torch.equal(met[name], met[example.PLAIN])
        for key, value in begun[example.PLAIN].items():
            assert torch.equal(value, begun[name][key]), key
    slots = "slims.0.fc2.weight"
    assert torch.equal(begun[example.SCRATCH][slots], begun[example.PLAIN][slots])
    assert not torch.equal(
        begun[example.SCRATCH]["head.weight"], begun[example.PLAIN]["head.weight"]
    )


def test_figures_and_pictures_are_written_and_read(
    example: ModuleType, small: tuple, tmp_path: Path, monkeypatch, capsys
) -> None:
    setup, result, models = small
    out, docs = tmp_path / "result.json", tmp_path / "docs"
    monkeypatch.setattr(example, "Setup", lambda: setup)
    monkeypatch.setattr(example, "run", lambda *_: (result, models))
    monkeypatch.setattr(sys, "argv", ["sit_digits.py", "--out", str(out), "--docs", str(docs)])
    example.main()
    told = json.loads(out.read_text())
    assert told == json.loads(json.dumps(result))
    assert (docs / "sit_digits.md").read_text() == example.page(told) == example.page(result)
    pictures = ["sit_digits_curves.png", "sit_digits_slots.png", "sit_photograph_slots.png"]
    assert sorted(file.name for file in docs.iterdir()) == sorted(["sit_digits.md", *pictures])
    for name in pictures:
        assert (docs / name).read_bytes().startswith(b"\x89PNG")
    table = example.table(told)
    assert table in capsys.readouterr().out and table.count("\n") == 1 + 5


def test_the_page_is_that_of_the_committed_figures(example: ModuleType) -> None:
    result = json.loads(RESULT.read_text())
    assert (DOCS / "sit_digits.md").read_text() == example.page(result)
    assert len(result["setup"]["seeds"]) == 3 and result["seconds"] < 8 * 60
    for name in ("sit_digits_curves.png", "sit_digits_slots.png", "sit_photograph_slots.png"):
        assert (DOCS / name).stat().st_size <= 400_000


def test_the_committed_figures_show_what_distillation_is_worth() -> None:
    """Better than the labels alone, on every seed, and at most a point below the teacher."""
    result = json.loads(RESULT.read_text())
    names = list(dict.fromkeys(row["model"] for row in result["runs"]))
    teacher, _, plain, frd, _ = (
        [row["test"] for row in result["runs"] if row["model"] == name] for name in names
    )
    assert all(one > other for one, other in zip(frd, plain, strict=True))
    assert sum(teacher) / 3 - sum(frd) / 3 <= 1


def test_slots_are_not_spread_by_nothing() -> None:
    slim = SlimTokens(16, 4)
    for std in (0.0, -1.0, float("inf")):
        with pytest.raises(
            ValueError, match=r"SlimTokens\.spread: std: allowed above 0, finite, got"
        ):
            slim.spread(std)
    with pytest.raises(TypeError, match=r"SlimTokens\.spread: std: allowed a number, got"):
        slim.spread("wide")
