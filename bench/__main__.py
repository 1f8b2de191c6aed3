"""The main job: measures the roofs, the models and every op, shows a table, writes JSON, Markdown
and one HTML page.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import settings

FOLDER = Path(__file__).parent
SECONDS = {True: 100.0, False: 540.0}
"""For everything, when quick or not."""


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where one of our own kernels failed its comparison, or the models did not run."""
    options = _options(arguments)
    if options.tune:
        return _tune(options.tune)
    settings.restart(options.threads)
    start = time.perf_counter()
    # Only now: torch starts its threads when it is imported.
    from bench import bench_ops, machine, report, roofline

    console = report.console()
    result: dict[str, Any] = {"machine": machine.facts(), "quick": options.quick}
    console.print(report.headline(result))
    with console.status("measuring the roofs of this machine"):
        result["roof"] = roofline.measure(6.0 if options.quick else 15.0)
    console.print(report.roofs(result))
    result["models"], result["models_left_out"] = [], "not asked for"
    if not options.only:
        result["models"], result["models_left_out"] = _models(options.quick)
    result["ops"] = []
    todo = bench_ops.cells(options.quick, options.only)
    left = (options.seconds or SECONDS[options.quick]) - (time.perf_counter() - start)
    with report.progress(console) as bar:
        task = bar.add_task("ops", total=len(todo))
        for cell, rows in bench_ops.run(todo, result["roof"], left):
            result["ops"] += [asdict(row) for row in rows]
            bar.console.print(report.line(str(cell), result["ops"][-len(rows) :]))
            bar.advance(task)
    result["seconds"] = time.perf_counter() - start
    report.show(console, result)
    _write(result, options.save, console)
    wrong = [row for row in result["ops"] if row["failed"] and row["role"] == "ours"]
    return int(bool(wrong) or result["models_left_out"].startswith("failed"))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case per op, under two minutes")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cells in whose name this stands, no models"
    )
    parser.add_argument(
        "--seconds", type=float, help="for everything (default: 100 when quick, else 540)"
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


def _models(quick: bool) -> tuple[list[dict[str, Any]], str]:
    if importlib.util.find_spec("bench.bench_models") is None:
        return [], "bench/bench_models.py is not there"
    try:
        return importlib.import_module("bench.bench_models").run(quick), ""
    except Exception as error:  # the ops are still worth timing; the exit status tells
        return [], f"failed: {type(error).__name__}: {error}"


def _write(result: dict[str, Any], save: str | None, console: Any) -> None:
    from bench import report

    out = FOLDER / "out"
    out.mkdir(exist_ok=True)
    targets = [out / "result.json", *([FOLDER / "results" / f"{save}.json"] if save else [])]
    for target in targets:
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    pages = report.write(result, out)
    console.print(
        "Written: " + ", ".join(str(path.relative_to(FOLDER.parent)) for path in [*targets, *pages])
    )


if __name__ == "__main__":
    raise SystemExit(main())
