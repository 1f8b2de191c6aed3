"""`make gpu` goes its whole way without a GPU: sections, store, tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenmodels.sit import SiTConfig

from bench import bench_models
from bench.gpu import store, tests

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_dry_run_measures_and_is_not_repeated(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--budget", "400"]
    command += ["--only", "machine bench test merge_backward", "--out", str(tmp_path)]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Tests" in done.stdout and "copy, cold, 1 MiB" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    bench = [line for line in lines if line["section"] == "bench"]
    assert [line.get("error") for line in bench] == [store.BEGUN, None] and bench[1]["rows"]
    tested = next(line for line in lines if line["section"] == "test")
    assert tested["tests"] > 0 and not tested["failed"]
    assert "<table>" in (tmp_path / "gpu.html").read_text()


def test_the_last_line_of_a_killed_process_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    path.write_text('{"section": "bench", "cell": "a", "hash": "1"}\n{"section": "be')
    assert [cell["cell"] for cell in store.load([path])] == ["a"]


def test_a_cell_is_measured_again_when_its_kernel_changed(tmp_path: Path) -> None:
    keep = store.Store(tmp_path, "bench")
    keep.add("a", "1")
    keep.add("b", "1", error="failed")
    again = store.Store(tmp_path, "bench")
    assert again.has("a", "1") and not again.has("a", "2") and not again.has("b", "1")
    assert store.Store(tmp_path, "bench", since=0.0).has("b", "1")


def test_a_line_behind_half_a_line_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "gpu.jsonl").write_text('{"section": "be')
    store.Store(tmp_path, "bench").add("a", "1")
    assert store.Store(tmp_path, "bench").has("a", "1")


class Job:
    """What the roofs ask of a section's job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, store.Store(folder, "bench")

    def left(self) -> float:
        return 1.0

    def attempt(self, cell: str, state: str, run: Any) -> None:
        self.store.add(cell, state, **run())


def test_roofs_of_another_state_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from bench.gpu import sections

    store.Store(tmp_path, "machine").add("roofs", "another", roof={"fma": 1.0})
    monkeypatch.setattr(sections.roofs, "measure", lambda seconds: {"fma": 2.0})
    assert sections._roof(Job(tmp_path)) == {"fma": 2.0}  # type: ignore[arg-type]
    monkeypatch.setattr(sections.roofs, "measure", lambda seconds: {"fma": 3.0})
    assert sections._roof(Job(tmp_path)) == {"fma": 2.0}  # type: ignore[arg-type]


def test_figures_of_networks_rest_on_files_that_are_there() -> None:
    pytest.importorskip("triton")
    from bench.gpu import sections

    for pattern in sections.MODELS:
        paths = list(ROOT.glob(pattern))
        assert paths and all(path.is_file() for path in paths), pattern


def test_the_grid_of_networks() -> None:
    from bench.gpu import models

    names = [name for name, _ in models.cells(dry=False)]
    assert len(names) == len(set(names)) == (5 * 5 - 1) * 3 * 2
    assert "sit_medium batch 512 bfloat16 compiled" in names
    assert "sit_large batch 512 bfloat16 compiled" not in names


def test_a_network_is_measured_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import models

    small = SiTConfig(embed_dim=64, depth=2, num_heads=1, stages=(1, 1), image_size=64)
    for module in (models, bench_models):
        monkeypatch.setattr(module, "VARIANTS", {"small": small})
    monkeypatch.setattr(models.timing, "extra_memory", lambda call: 3_000_000)
    rows = models._measure("small", 1, "float32", "eager")
    assert [row["build"] for row in rows].count("ours, eager") == 2
    assert {row["extra MB"] for row in rows} == {3.0} and all(row["ms"] > 0 for row in rows)


@pytest.mark.parametrize("exponentials", [False, True])
def test_a_chain_tells_how_many_steps_it_took(exponentials: bool) -> None:
    pytest.importorskip("triton")
    from bench.gpu import rates

    x = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    for steps in (32, rates.STEPS):
        ends = [rates.ended(x, steps + more, exponentials) for more in (-1, 0, 1)]
        assert min((ends[1] - ends[0]).min(), (ends[2] - ends[1]).min()) > 3 * rates.TOLERANCE
    rounded = rates.ended(x.float(), rates.STEPS, exponentials).double()
    assert (rounded - rates.ended(x, rates.STEPS, exponentials)).abs().max() < rates.TOLERANCE / 3


def test_chains_compile_to_what_they_measure() -> None:
    """In a process of its own, where kernels are compiled, not interpreted."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    per_thread = 8 * 16
    assert json.loads(done.stdout) == [[per_thread, 0], [0, per_thread]]


COMPILED = r"""
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.gpu import rates

types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "steps": "i32"}
types |= {"EXPONENTIALS": "constexpr", "BLOCK": "constexpr"}
found = []
for exponentials in (False, True):
    constants = {"EXPONENTIALS": exponentials, "BLOCK": rates.BLOCK}
    source = ASTSource(rates.chain_kernel, types, constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    label, loop = re.search(r"^(\$L\w+):(.*?)bra\s+\1;", ptx, re.M | re.S).groups()
    found.append([loop.count(name) for name in ("fma.rn.f32", "ex2.approx")])
print(json.dumps(found))
"""

DEADLY = """
import os, time
import pytest

@pytest.mark.parametrize("number", range(4))
def test_one(number):
    if number == 1:
        os.kill(os.getpid(), 9)
    assert number != 2, "two"
"""


def test_tests_go_on_behind_one_that_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_deadly.py").write_text(DEADLY)
    (tmp_path / "conftest.py").write_text(OPTIONS)
    monkeypatch.setitem(tests.PARTS, "deadly", ([str(tmp_path / "test_deadly.py")], "", 1))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'python'}")
    process = tests.Process("any", "deadly", "1/1", tmp_path)
    process.start(dry=False)
    while not process.ended(dry=False):
        time.sleep(0.1)
    found = process.result()
    assert found["passed"] == 2 and found["error"] == "2 failed"
    assert next(iter(found["failed"].values())) == "the process died"


OPTIONS = """
def pytest_addoption(parser):
    parser.addoption("--op")
    parser.addoption("--triton")
"""
