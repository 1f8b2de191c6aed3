"""SiT from photograph to logits: dense and slimmed, as its authors formulated it and as we run it,
both eager and compiled.

`python -m bench.bench_models --save NAME` writes bench/results/NAME.json. The photographs are those
inside scikit-learn; the weights are random, which changes no cost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "python"))

from tokenmodels.sit import VARIANTS, SiT, SiTConfig

from bench import machine, official_sit, report, roofline, settings, tables, timing
from bench.photographs import photographs

Record = dict[str, Any]
Form = tuple[SiTConfig, Callable[[Tensor], Any]]
FOLDER = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCHES = (1, 8, 32, 128)
KINDS = ("eager", "compiled")
FORMS = ("official", "ours")
TOLERANCE = 1e-4
"""Of the largest logit, in float32: two ways to the same numbers."""
AS_OFFICIAL = 3.0
"""In 16 bits: the most that a build may be further from the float32 logits than the official
formulation is, in which autocast leaves the tokens between the layers in float32.
"""
ROUNDS = (7, 25)
SECONDS = {True: 20.0, False: 60.0}
"""For the models among everything else, when quick or not."""
SLACK = 1.6
"""A network's time over that of as many multiply-accumulates in one large product, at most."""
SETUP = 0.15
"""Seconds per block to make the weights of a network, and to fold them."""
COMPILE = 0.8
"""Seconds per block to compile a network, until one was."""


@dataclass(frozen=True)
class Cell:
    """What is measured together: a variant and its teacher, in both forms, by some kinds."""

    name: str
    batch: int
    dtype: str
    kinds: tuple[str, ...]

    @property
    def configs(self) -> tuple[SiTConfig, SiTConfig]:
        """The teacher's, the slimmed one's."""
        return replace(VARIANTS[self.name], dense=True), VARIANTS[self.name]

    def seconds(self, rates: dict[str, float], compile_block: float) -> float:
        """What it will take, by the rate of products (multiply-accumulates/s) in its dtype."""
        macs = sum(config.macs() for config in self.configs) * self.batch
        calls = len(FORMS) * len(self.kinds) * (ROUNDS[0] + 3)
        work = calls * macs * SLACK / rates[self.dtype]
        compiling = self.blocks() * compile_block if "compiled" in self.kinds else 0.0
        setup = 2 * self.configs[0].depth * SETUP * (self.configs[0].embed_dim / 384) ** 2
        return work + compiling + setup

    def blocks(self) -> int:
        """Of all networks that one kind runs."""
        return len(FORMS) * sum(config.depth for config in self.configs)

    def __str__(self) -> str:
        return f"{self.name} batch {self.batch} {self.dtype} {' and '.join(self.kinds)}"


FIRST = (Cell("sit_xsmall", 8, "float32", KINDS), Cell("sit_small", 8, "float32", KINDS))
"""What a run of the models alone begins with: all builds take turns."""
AMONG_OTHERS = (
    *(replace(cell, kinds=("eager",)) for cell in FIRST),
    Cell("sit_tiny", 1, "float32", ("eager",)),
)


def run(quick: bool) -> list[Record]:
    """The models among everything else that `python -m bench` measures; see `measure`."""
    cells: Sequence[Cell] = AMONG_OTHERS
    if quick:
        cells = [replace(cell, batch=1) for cell in AMONG_OTHERS]
    rows = measure(cells, SECONDS[quick])
    assert not failures(rows), failures(rows)
    return rows


def measure(cells: Sequence[Cell], seconds: float) -> list[Record]:
    """Times cells in this order, as long as so many seconds last; one record per network and build.

    Columns: `GMAC` is of one image. `faster` is the time of the dense network in the same build
    over this one's; `in theory` the same of their multiply-accumulates; `realised` the former over
    the latter: the share of the theoretical saving that arrives. `than official` is over the time
    of the official formulation of the same kind. A cell that is left out has a record that says
    why in `left out`, one that failed, as where the logits of a build are not the official
    formulation's, in `failed`. Other work took `others_percent` of one processor meanwhile.
    """
    settings.keep_freed_memory()
    end = time.perf_counter() + seconds
    rates = {dtype: _rate(DTYPES[dtype]) for dtype in {cell.dtype for cell in cells}}
    compile_block = COMPILE
    found: list[Record] = []
    console = report.console()
    with report.progress(console) as bar, torch.inference_mode():
        task = bar.add_task("models", total=len(cells))
        for cell in cells:
            need, left = cell.seconds(rates, compile_block), end - time.perf_counter()
            if need > left:
                why = f"takes about {need:.0f} s, {max(left, 0):.0f} s were left"
                found.append(_without(cell, "left out", why))
            elif isinstance(rows := _attempt(cell), str):
                found.append(_without(cell, "failed", rows))
            else:
                found += rows
                if "compiled" in cell.kinds:
                    took = sum(row["compiled in s"] or 0.0 for row in rows)
                    compile_block = took / cell.blocks()
                bar.console.print(f"{cell}: {_line(rows)}")
            settings.give_back_memory()
            bar.advance(task)
    return found


def forms_of(
    config: SiTConfig, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[tuple[str, bool], Form]:
    """(form, slimmed or not) → what it computes, and how; all share their weights.

    The forms are "official", "ours", and "exact": the official formulation in float32. In 16 bits
    the official one runs as its authors run it, by autocast; its own casts let it do no other.
    """
    forms: dict[tuple[str, bool], Form] = {}
    for slim in (False, True):
        torch.manual_seed(0)
        model = SiT(replace(config, dense=not slim)).eval().to(device)
        forms["exact", slim] = model.config, _official(model, torch.float32)
        forms["official", slim] = model.config, _official(model, dtype)
        forms["ours", slim] = model.config, model.fold_for_inference().to(dtype)
    return forms


def _official(model: SiT, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def logits(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            return official_sit.forward(model, images)[0]

    return logits


@contextlib.contextmanager
def casts_kept() -> Iterator[None]:
    """Autocast casts a weight once within it, as where a whole evaluation runs under autocast."""
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def _attempt(cell: Cell) -> list[Record] | str:
    """Its records, or what went wrong: the next cell may do better, the exit status tells."""
    try:
        return _measured(cell)
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def _measured(cell: Cell) -> list[Record]:
    torch.compiler.reset()  # it compiles the same function for so many models only
    dtype, size = DTYPES[cell.dtype], cell.configs[0].image_size
    assert isinstance(size, int)
    forms, exact = forms_of(VARIANTS[cell.name], "cpu", dtype), photographs(cell.batch, size)
    images = exact.to(dtype)
    calls: dict[tuple[str, str, bool], timing.Call] = {}
    compiled: dict[tuple[str, str, bool], float] = {}
    with casts_kept():
        for kind in cell.kinds:
            for form in FORMS:
                for slim in (False, True):
                    function = forms[form, slim][1]
                    if kind == "compiled":
                        function = torch.compile(function, fullgraph=True, dynamic=False)
                    start = time.perf_counter()
                    function(images)
                    compiled[form, kind, slim] = time.perf_counter() - start
                    calls[form, kind, slim] = partial(function, images)
        errors = check(forms, calls, exact, dtype)
        others = timing.Others()
        samples = timing.alternate(calls, 2.0, ROUNDS, slow=math.inf)
        disturbed = others.percent()
    times = {key: statistics.median(values) for key, values in samples.items()}
    rows = list(records(cell.name, cell.dtype, cell.batch, times))
    for key, row in zip(times, rows, strict=True):
        row["compiled in s"] = compiled[key] if key[1] == "compiled" else ""
        row["error"] = f"{errors[key]:.1e}"
        row["samples"] = len(samples[key])
        row["others_percent"] = disturbed
    return rows


def check(
    forms: dict[tuple[str, bool], Form],
    calls: dict[tuple[str, str, bool], timing.Call],
    images: Tensor,
    dtype: torch.dtype,
    tolerance: float = TOLERANCE,
) -> dict[tuple[str, str, bool], float]:
    """Per build its largest distance to the logits that the official formulation gives in float32,
    as a share of the largest of these.

    Raises:
        AssertionError: one that is too large.
    """
    errors: dict[tuple[str, str, bool], float] = {}
    for slim in (False, True):
        want = forms["exact", slim][1](images)

        def error(got: Tensor, want: Tensor = want) -> float:
            return ((got.float() - want).abs().max() / want.abs().max()).item()

        bound = tolerance
        if dtype != torch.float32:
            bound = AS_OFFICIAL * error(forms["official", slim][1](images.to(dtype)))
        for key in calls:
            if key[2] == slim:
                errors[key] = error(calls[key]())
                who = f"{'slimmed' if slim else 'dense'}, {key[0]} {key[1]}"
                assert errors[key] <= bound, f"{who}: off by {errors[key]:.2g} of the largest logit"
    return errors


def records(
    name: str, dtype: str, batch: int, times: dict[tuple[str, str, bool], float]
) -> Iterator[Record]:
    """One record per form, kind, and dense or slimmed, from the seconds that each takes."""
    costs = {slim: replace(VARIANTS[name], dense=not slim).macs() for slim in (False, True)}
    for (form, kind, slim), took in times.items():
        faster, theory = times[form, kind, False] / took, costs[False] / costs[slim]
        yield {
            "model": name if slim else f"{name}, dense",
            "build": f"{form}, {kind}",
            "dtype": dtype,
            "batch": batch,
            "ms": took * 1e3,
            "images/s": batch / took,
            "GMAC": costs[slim] / 1e9,
            "faster": faster,
            "in theory": theory,
            "realised": f"{faster / theory:.0%}" if slim else "",
            "than official": times["official", kind, slim] / took,
        }


def failures(rows: Iterable[Record]) -> list[str]:
    """What went wrong, cell by cell."""
    return [f"{row['model']}, {row['build']}: {row['failed']}" for row in rows if "failed" in row]


def _without(cell: Cell, key: str, why: str) -> Record:
    return {
        "model": cell.name,
        "build": " and ".join(cell.kinds),
        "dtype": cell.dtype,
        "batch": cell.batch,
        key: why,
    }


def _line(rows: list[Record]) -> str:
    ours = [row for row in rows if row["build"].startswith("ours") and row["realised"]]
    return ", ".join(
        f"{row['build'].split()[1]} {row['images/s']:.1f} images/s, {row['faster']:.2f} of "
        f"{row['in theory']:.2f} × dense, {row['than official']:.2f} × official"
        for row in ours
    )


def _rate(dtype: torch.dtype) -> float:
    """Multiply-accumulates/s of the fastest large product."""
    if dtype == torch.float16:
        return _rate(torch.float32) / 2  # computed in float32 by most processors
    took = timing.alternate(roofline.product_calls(dtype), 0.5, (3, 10))
    return float(roofline.PRODUCT**3 / min(map(min, took.values())))


def all_cells(
    names: Iterable[str], batches: Iterable[int], dtypes: Iterable[str], kinds: Iterable[str]
) -> list[Cell]:
    """`FIRST` first, then the cheapest; what is eager and what is compiled apart, so that a
    compilation that takes too long takes nothing along.
    """
    wanted = {
        Cell(name, batch, dtype, (kind,))
        for name in names for batch in batches for dtype in dtypes for kind in kinds
    }  # fmt: skip
    first = [
        cell for cell in FIRST if all(replace(cell, kinds=(kind,)) in wanted for kind in cell.kinds)
    ]
    covered = {replace(cell, kinds=(kind,)) for cell in first for kind in cell.kinds}
    rates = {"float32": 1e11, "bfloat16": 4e11, "float16": 5e10}
    rest = sorted(wanted - covered, key=lambda cell: (cell.seconds(rates, COMPILE), str(cell)))
    return [*first, *rest]


def main(arguments: list[str] | None = None) -> int:
    """Measures alone, writes JSON and Markdown, prints the table; returns 1 where a cell failed."""
    options = _options(arguments)
    settings.restart()
    from bench.__main__ import _quieten

    _quieten()
    start = time.perf_counter()
    cells = all_cells(options.variants, options.batches, options.dtypes, options.builds)
    rows = measure(cells, options.seconds)
    result = {"machine": machine.facts(), "seconds": time.perf_counter() - start, "models": rows}
    shown = tables_of(rows)
    console = report.console()
    for table in shown:
        console.print(report.drawn(table))
    headline = report.headline(result)
    text = "\n\n".join(
        ["# SiT, end to end", headline]
        + [f"## {table.title}\n\n{report.as_markdown(table)}" for table in shown]
    )
    targets = {FOLDER / "out" / "models.md": text + "\n"}
    for folder, name in [("out", "models")] + ([("results", options.save)] if options.save else []):
        targets[FOLDER / folder / f"{name}.json"] = _json(result)
    for path, content in targets.items():
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".new").write_text(content)
        path.with_suffix(".new").replace(path)
    console.print("Written: " + ", ".join(str(path.relative_to(FOLDER.parent)) for path in targets))
    return int(bool(failures(rows)))


def tables_of(rows: list[Record]) -> list[tables.Table]:
    """What was timed, what was left out, what failed."""
    found = {
        "Models": [row for row in rows if "ms" in row],
        "Left out": [row for row in rows if "left out" in row],
        "Failed": [row for row in rows if "failed" in row],
    }
    return [tables.of_records(title, some) for title, some in found.items() if some]


def _json(result: dict[str, Any]) -> str:
    """One line per record, so that files of two runs can be compared."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["models"])
    others = json.dumps({key: result[key] for key in result if key != "models"}, indent=1)
    return others.removesuffix("\n}") + f',\n "models": [\n{rows}\n ]\n}}\n'


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_models", description=__doc__)
    parser.add_argument("--seconds", type=float, default=420.0, help="for everything")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    for name, kind, known in (
        ("variants", str, tuple(VARIANTS)),
        ("batches", int, BATCHES),
        ("dtypes", str, ("float32", "bfloat16")),
        ("builds", str, KINDS),
    ):
        allowed = {"variants": tuple(VARIANTS), "dtypes": tuple(DTYPES), "builds": KINDS}.get(name)
        parser.add_argument(
            f"--{name}", nargs="+", type=kind, default=known, choices=allowed, metavar=name[:-1]
        )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
