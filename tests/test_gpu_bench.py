"""`make gpu` goes its whole way without a GPU: sections, store, tables."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
