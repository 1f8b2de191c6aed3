"""`make gpu` goes its whole way without a GPU: sections, store, tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import store

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_dry_run_measures_and_is_not_repeated(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--budget", "120"]
    command += ["--only", "machine bench test merge_backward", "--out", str(tmp_path)]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Tests" in done.stdout and "copy 1 MiB" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["section"] for line in lines].count("bench") == 1
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
