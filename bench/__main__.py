"""The main job: measures the roofs, models, quantisers, small calls and every op, shows tables,
writes JSON, Markdown and one HTML page.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import settings

FOLDER = Path(__file__).parent
SECONDS = {True: 100.0, False: 560.0}
"""For everything, when quick or not."""
SECTIONS = {"models": "bench_models", "quantisers": "vq_training", "small calls": "small_calls"}
"""What is measured beside the ops: each by `run(quick)` of its module, which returns records."""


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where one of our own kernels failed its comparison, or a section did not run."""
    options = _options(arguments)
    if options.tune:
        return _tune(options.tune)
    settings.restart(options.threads)
    start = time.perf_counter()
    # Only now: torch starts its threads when it is imported.
    from bench import bench_ops, machine, report, roofline

    console = report.console()
    _quieten()
    result: dict[str, Any] = {"machine": machine.facts(), "quick": options.quick}
    console.print(f"[bold]tokenkernels bench[/bold] · {report.headline(result)}")
    with console.status("measuring the roofs of this machine"):
        result["roof"] = roofline.measure(6.0 if options.quick else 10.0)
    console.print(report.roofs(result))
    result["sections"], result["sections_left_out"] = _sections(options)
    result["ops"] = []
    todo = bench_ops.cells(options.quick, options.only)
    left = (options.seconds or SECONDS[options.quick]) - (time.perf_counter() - start)
    with report.progress(console) as bar:
        task = bar.add_task("ops", total=len(todo))
        for cell, rows in bench_ops.run(todo, result["roof"], left):
            result["ops"] += [asdict(row) for row in rows]
            bar.console.print(report.line(str(cell), result["ops"][-len(rows) :]))
            bar.advance(task)
    result["ops"].sort(key=lambda row: row["op"])
    result["seconds"] = time.perf_counter() - start
    report.show(console, result)
    _write(result, options.save, console)
    wrong = [row for row in result["ops"] if row["failed"] and row["role"] == "ours"]
    return int(bool(wrong or result["sections_left_out"]))


def _quieten() -> None:
    """What the compiler thinks of the peers is not what this is about."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch\._dynamo")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case per op, under two minutes")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only cells and sections in whose name this stands",
    )
    parser.add_argument(
        "--seconds", type=float, help="for everything (default: 100 when quick, else 560)"
    )
    parser.add_argument("--threads", type=int, help="default: OMP_NUM_THREADS, else all cores")
    parser.add_argument(
        "--save", metavar="NAME", help="also write bench/results/NAME.json, to be committed"
    )
    parser.add_argument(
        "--tune", metavar="OP", help="sweep the block shapes of its Triton kernels, on a GPU"
    )
    return parser.parse_args(arguments)


def _tune(op: str) -> int:
    import torch

    if not torch.cuda.is_available():
        print("bench: --tune needs a GPU")
        return 1
    from bench import report
    from bench.gpu import tune

    report.console().print(report.drawn(tune.sweep(op)))
    return 0


def _sections(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The records of every section that was asked for, and why others have none."""
    records, left_out = {}, {}
    for name, module in SECTIONS.items():
        if options.only in name:
            try:
                records[name] = importlib.import_module(f"bench.{module}").run(options.quick)
            except Exception as error:  # the ops are still worth timing; the exit status tells
                left_out[name] = f"{type(error).__name__}: {error}"
    return records, left_out


def _write(result: dict[str, Any], save: str | None, console: Any) -> None:
    from bench import report

    out = FOLDER / "out"
    out.mkdir(exist_ok=True)
    targets = [out / "result.json", *([FOLDER / "results" / f"{save}.json"] if save else [])]
    for target in targets:
        target.parent.mkdir(exist_ok=True)
        target.write_text(_text(result))
    pages = report.write(result, out)
    console.print(
        "Written: " + ", ".join(str(path.relative_to(FOLDER.parent)) for path in [*targets, *pages])
    )


def _text(result: dict[str, Any]) -> str:
    """JSON with one line per row of the ops, so that files of two runs can be compared."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["ops"])
    others = json.dumps({key: result[key] for key in result if key != "ops"}, indent=1)
    return others.removesuffix("\n}") + f',\n "ops": [\n{rows}\n ]\n}}\n'


if __name__ == "__main__":
    raise SystemExit(main())
