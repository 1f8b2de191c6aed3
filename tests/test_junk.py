"""Random bad calls of everything callable end in words, and never end the process; names no op."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from junk import bad_call, bad_numpy_call, bad_schema_call, described, good_calls

from tokenkernels._op import OPS, Op

COUNT = 10_000


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.function and op.cases], ids=lambda op: op.name
)
def test_public_functions(op: Op) -> None:
    draw, calls = random.Random(op.name), good_calls(op)
    for _ in range(COUNT):
        try:
            op.run(bad_call(draw, calls))
        except (ValueError, TypeError) as error:
            assert str(error)


def survive(kind: str, again: Any, file: Path) -> None:
    """The calls run in a process of their own; where it ends early, the last call is told."""
    file.touch()
    script = str(Path(__file__).with_name("junk.py"))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", script, kind, str(COUNT), str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=600,
    )
    name, number = file.read_text().split() or ("no op", "-1")
    if done.returncode:
        called = described(again(name, int(number))[1]) if number != "-1" else None
        pytest.fail(f"{name}, call {number}, {done.returncode}: {called}\n{done.stderr[-3000:]}")
    assert number == str(COUNT - 1)


def test_schema_ops(native: None, tmp_path: Path) -> None:
    """Behind the functions, where nothing is checked but what memory needs."""
    survive("schema", bad_schema_call, tmp_path / "call")


def test_functions_on_arrays(native: None, tmp_path: Path) -> None:
    survive("numpy", bad_numpy_call, tmp_path / "call")
