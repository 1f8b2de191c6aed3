"""The Triton room as a whole: launches, tables, compilation ahead of time; names no op."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from trial import DEVICE, arguments, every_case

from tokenkernels import triton as room
from tokenkernels._op import OPS, Case, Op

pytest.importorskip("triton")
from ahead_of_time import Shapes, launches, only_values_tell

from bench.contenders import Cell
from bench.gpu import tune
from tokenkernels.triton import _launch

ROOT = Path(__file__).parents[1]
MODULES = [import_module(f"{room.__name__}.{m.name}") for m in pkgutil.iter_modules(room.__path__)]
DEFINED = {
    f"{module.__name__}:{name}"
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, _launch.Kernel) and value.vector.__module__ == module.__name__
}
TABLES = {
    f"{module.__name__}.{name}": value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, _launch.Table)
}


@every_case
def test_launches_are_as_many_as_promised(op: Op, case: Case) -> None:
    """Forward and backward; a copy that torch makes counts as a launch, and no threshold form
    synchronises more than once.
    """
    if reason := op.why_not("triton", DEVICE):
        pytest.skip(reason)
    kwargs = arguments(op, case)
    assert op.launches is not None, f"{op.name} does not say how many launches it takes"
    for dry, promised in zip(launches(op, kwargs, DEVICE, 90), op.launches(kwargs), strict=True):
        assert dry.syncs <= 1
        names = [launch.kernel.name for launch in dry.launches] + dry.copies
        assert len(names) <= promised, f"{promised} promised, {len(names)} made: {names}"


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_a_table_has_an_answer_to_every_call(name: str, capability: int) -> None:
    table = TABLES[name]
    assert table.reason.endswith(".")
    for size in (2, 4):
        for width in (1, 8, 12, 64, 128, 384, 768, 1024, 4096, 16384):
            first = table.choose(size, width, capability)
            assert first == table.choose(size, width, capability)
            assert first.warps in (1, 2, 4, 8, 16) and all(b > 0 for b in first.blocks.values())


timed_cases = [(op, case) for op in OPS.values() for case in op.cases if "bench" in case.tags]


@pytest.mark.parametrize("op", dict.fromkeys(op for op, _ in timed_cases), ids=lambda op: op.name)
def test_a_sweep_finds_the_tables_that_decide_for_an_op(op: Op) -> None:
    """Forward, and backward where there is a gradient; where only values tell what is launched, of
    the small cases.
    """
    case = next(case for case in op.cases if "bench" in case.tags)
    kwargs = case.make(Shapes(case.id, case.dtypes[0]))
    try:
        found = [dry.choices for dry in launches(op, kwargs, "meta", 90)]
    except RuntimeError as error:
        assert only_values_tell(error)
        found = [dry.choices for dry in launches(op, arguments(op, op.cases[0]), DEVICE, 90)]
    assert found[0] and (found[1] or not op.differentiable)
    for choices in found:
        assert len(set(tune.named(choices).values())) == len(choices)
        for table, chosen in choices.items():
            assert len(list(tune.shapes(table, chosen))) > 2


def test_a_sweep_times_every_shape_that_gives_the_right_results() -> None:
    if DEVICE != "cpu":
        pytest.skip("sweeps the interpreter")
    op = min((op for op, _ in timed_cases), key=lambda op: len(op.cases))
    lines = tune.sweep_cell(Cell(op, op.cases[0], torch.float32), 0.01)
    assert lines and all(float(us) > 0 for *_, us, _ in lines)
    assert {name for _, name, *_, mark in lines if mark} == {name for _, name, *_ in lines}


def test_every_kernel_compiles_ahead_of_time_without_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(ROOT / "tests" / "ahead_of_time.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    spilling = [k for k in kernels if k["spilled"]]
    assert not spilling, "\n".join(map(str, spilling))
    assert {k["capability"] for k in kernels} == {80, 90, 100}
    seen = {k["kernel"] for k in kernels}
    assert seen >= DEFINED, f"no bench case reaches {DEFINED - seen}"


OLDEST = Path(sys.prefix) / "oldest"
SPILLED = {
    "_score_keys:score": 24,
    "accumulate_codes:rank": 72,
    "gather_topk:gather": 8,
    "merge_runs:merge": 8,
}
"""Bytes that the oldest Triton's ptxas puts aside: less than what a fix costs with the newest."""


@pytest.mark.parametrize("oldest", [False, True])
def test_every_kernel_goes_through_tritons_launcher(oldest: bool) -> None:
    """Compiled for sm_90 at its first call, by the oldest Triton that is supported in two dtypes;
    in float32, for the launcher's sake, by the one that is installed.
    """
    if shutil.which("cc") is None or (oldest and not (OLDEST / "triton").exists()):
        pytest.skip("no compiler" if shutil.which("cc") is None else f"no Triton in {OLDEST}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [OLDEST] * oldest + [ROOT, ROOT / "python"]
    environment |= {"PYTHONPATH": ":".join(map(str, paths)), "TRITON_DEFAULT_FP_FUSION": "1"}
    folder = ROOT / "build" / "no_driver" / ("oldest" if oldest else "installed")
    command = [sys.executable, str(ROOT / "tests" / "launched.py"), str(folder)]
    command += ["float32", "bfloat16"] if oldest else ["float32"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    seen = {k["kernel"] for k in kernels}
    assert seen >= DEFINED, f"no case reaches {DEFINED - seen}"
    allowed = {f"{room.__name__}.{name}": count for name, count in SPILLED.items() if oldest}
    spilling = [k for k in kernels if k["spilled"] > allowed.get(k["kernel"], 0)]
    assert not spilling, "\n".join(map(str, spilling))
    if oldest:
        (version,) = {k["triton"].rpartition(".")[0] for k in kernels}
        assert f'"triton>={version}"' in (ROOT / "pyproject.toml").read_text()
