"""The bench of whole networks: what it chooses to time, what it makes of times, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenmodels.sit import VARIANTS, SiTConfig

from bench import bench_models as bench
from bench.photographs import photographs

SMALL = SiTConfig(embed_dim=64, depth=4, num_heads=1, stages=(1, 1, 2), image_size=64)
KNOWN = {**VARIANTS, "small": SMALL, "smaller": replace(SMALL, embed_dim=32)}


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROUNDS", (1, 1))
    monkeypatch.setattr(bench, "VARIANTS", KNOWN)
    monkeypatch.setattr(bench.settings, "keep_freed_memory", lambda: None)


def test_what_times_say() -> None:
    """A slimmed network that is as much faster as its MACs are fewer realises all of the saving."""
    times = {
        ("official", "eager", False): 8.0,
        ("official", "eager", True): 4.0,
        ("ours", "eager", False): 3.7336512754186275,
        ("ours", "eager", True): 1.0,
    }
    rows = {(r["model"], r["build"]): r for r in bench.records("sit_xsmall", "float32", 4, times)}
    dense, slim = rows["sit_xsmall, dense", "ours, eager"], rows["sit_xsmall", "ours, eager"]
    assert slim["faster"] == slim["in theory"] and slim["realised"] == "100%"
    assert rows["sit_xsmall", "official, eager"]["realised"] == "54%" and dense["realised"] == ""
    assert slim["than official"] == 4 and slim["images/s"] == 4 and slim["ms"] == 1000
    assert dense["GMAC"] == 5.531507712 and slim["GMAC"] == 1.48152768


def test_which_cells() -> None:
    """The grid whole, each network and build once, what must be known first, then the cheapest."""
    cells = bench.all_cells(VARIANTS, bench.BATCHES, ("float32", "bfloat16"), bench.KINDS)
    assert tuple(cells[:2]) == bench.FIRST
    single = [replace(cell, kinds=(kind,)) for cell in cells for kind in cell.kinds]
    assert len(single) == len(set(single)) == 5 * 4 * 2 * 2
    rates = {"float32": 1e11, "bfloat16": 4e11}
    costs = [cell.seconds(rates, bench.COMPILE) for cell in cells[2:]]
    assert costs == sorted(costs)
    (one,) = bench.all_cells(["sit_large"], [8], ["bfloat16"], ["eager"])
    assert str(one) == "sit_large batch 8 bfloat16 eager"
    assert one.configs[0].image_size == 288 and one.configs[0].dense


def test_what_is_left_out_says_why() -> None:
    rows = bench.measure(bench.FIRST, 0.0)
    assert [row["model"] for row in rows] == ["sit_xsmall", "sit_small"]
    assert all("s, 0 s were left" in row["left out"] for row in rows)
    assert [table.title for table in bench.tables_of(rows)] == ["Left out"]
    assert not bench.failures(rows)


def test_a_compilation_is_expected_to_last_as_long_as_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once a cell is known, all of what it took, no more, is charged to one like it."""
    asked: list[float] = []
    seconds = bench.Cell.seconds

    def noted(cell: bench.Cell, rates: dict[str, float], compile_block: float) -> float:
        asked.append(seconds(cell, rates, compile_block) - seconds(cell, rates, 0.0))
        return 0.0

    rows = [{"realised": "", "build": "", "compiled in s": took} for took in (9.0, 3.0, 1.0, 2.0)]
    monkeypatch.setattr(bench.Cell, "seconds", noted)
    monkeypatch.setattr(bench, "_attempt", lambda cell: rows)
    bench.measure([bench.Cell("small", 1, "float32", ("compiled",))] * 2, 600.0)
    assert asked[0] == pytest.approx(4 * 4 * bench.COMPILE)
    assert asked[1] == pytest.approx(15.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cell_is_measured(dtype: str) -> None:
    rows = bench.measure([bench.Cell("small", 2, dtype, ("eager",))], 600.0)
    assert [(row["model"], row["build"]) for row in rows] == [
        ("small, dense", "official, eager"),
        ("small", "official, eager"),
        ("small, dense", "ours, eager"),
        ("small", "ours, eager"),
    ]
    assert all(row["ms"] > 0 and row["dtype"] == dtype for row in rows)
    assert all(row["others_percent"] is None or row["others_percent"] >= 0 for row in rows)
    (table,) = bench.tables_of(rows)
    assert len(table.rows) == 4 and "realised" in table.columns


def test_wrong_logits_fail_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    forms_of = bench.forms_of

    def wrong(config: Any, *rest: Any) -> Any:
        forms = forms_of(config, *rest)
        if config.embed_dim == 32:
            config, function = forms["ours", True]
            forms["ours", True] = config, lambda images: 1.001 * function(images)
        return forms

    monkeypatch.setattr(bench, "forms_of", wrong)
    cells = [bench.Cell(name, 1, "float32", ("eager",)) for name in ("smaller", "small")]
    failed, *rows = bench.measure(cells, 600.0)
    assert "slimmed, ours eager: off by 0.001 of the largest logit" in failed["failed"]
    assert len(rows) == 4 and bench.failures([failed, *rows])


def test_the_json_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "bench")
    monkeypatch.setattr(bench.settings, "restart", lambda: None)
    (tmp_path / "bench").mkdir()
    options = ["--save", "here", "--seconds", "0", "--variants", "sit_tiny", "--batches", "1", "8"]
    assert bench.main(options) == 0
    result = json.loads((tmp_path / "bench" / "results" / "here.json").read_text())
    assert result["machine"]["versions"]["torch"] and len(result["models"]) == 2 * 2 * 2
    assert {path.name for path in tmp_path.rglob("*.*")} == {
        "here.json",
        "models.json",
        "models.md",
    }
    with pytest.raises(SystemExit):
        bench.main(["--variants", "sit_huge"])


def test_the_photographs_differ() -> None:
    images = photographs(5, 64)
    assert images.shape == (5, 3, 64, 64) and images.std() > 0.5
    assert min((a - b).abs().mean() for i, a in enumerate(images) for b in images[:i]) > 0.05


@torch.inference_mode()
def test_a_weight_is_cast_once() -> None:
    linear, x = torch.nn.Linear(8, 8), torch.randn(2, 8)
    seen = []
    with bench.casts_kept():
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                linear(x)
                linear.weight.data.zero_()  # the cast of the first call is what the second takes
                seen.append(linear(x).abs().max().item())
    assert seen[0] > 0 and seen[0] == seen[1]
