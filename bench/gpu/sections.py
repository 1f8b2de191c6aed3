"""The sections of `python -m bench.gpu`, each in a process of its own."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu import cells, roofs, store, tests, timing, warm

HUNG = 75.0
"""Seconds after which a cell is taken for hung, and the process ends: it may compile ten kernels,
or peers.
"""
HUNG_MODEL = 240.0
"""The same where whole networks are compiled."""
MODELS = (
    "bench/bench_models.py",
    "bench/gpu/models.py",
    "bench/gpu/timing.py",
    "bench/official_sit.py",
    "csrc/cuda/*",
    "python/tokenmodels/_blocks.py",
    "python/tokenmodels/_frozen.py",
    "python/tokenmodels/sit/*.py",
    "tokenkernels/ops/*.py",
    "tokenkernels/triton/*.py",
)
"""What the figures of whole networks rest on."""


class Job:
    """What a section was asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.words, self.dry = options.words, options.dry_run
        self.folder = Path(options.out)
        self.until = time.monotonic() + options.seconds
        self.store = store.Store(self.folder, options.section, options.since)

    def left(self) -> float:
        return self.until - time.monotonic()

    def wants(self, cell: str) -> bool:
        return all(word in cell for word in self.words)

    def attempt(
        self, cell: str, state: str, run: Callable[[], dict[str, Any]], hung: float = HUNG
    ) -> None:
        """One cell, whatever becomes of it. Its line stands before it is tried, so that a process
        that dies of it or hangs is not led there again.
        """
        self.store.add(cell, state, error=store.BEGUN)
        faulthandler.dump_traceback_later(hung, exit=True)
        try:
            content = run()
        except Exception as error:  # the next cell may do better
            traceback.print_exc()
            content = {"error": f"{type(error).__name__}: {error}"[:300]}
        faulthandler.cancel_dump_traceback_later()
        self.store.add(cell, state, **content)
        problems = [row.get("failed") or "" for row in content.get("rows") or []]
        if any(map(timing.is_fatal, [content.get("error") or "", *problems])):
            raise SystemExit("CUDA gives nothing but errors in this process any more")
        gc.collect()
        if timing.has_gpu():
            torch.cuda.empty_cache()


def machine(job: Job) -> None:
    """Facts, what doctor says, and the measured roofs."""
    job.attempt("facts", "", _facts)
    _measure_roofs(job, min(2.0 if job.dry else 25.0, job.left() / 2))


def _roofs_state() -> str:
    return store.digest([f"bench/gpu/{name}.py" for name in ("roofs", "rates", "timing")])


def _measure_roofs(job: Job, seconds: float) -> None:
    state = _roofs_state()
    if not job.store.has("roofs", state):
        job.attempt("roofs", state, lambda: {"roof": roofs.measure(seconds)})


def _facts() -> dict[str, Any]:
    from bench import machine as facts
    from tokenkernels import _native
    from tokenkernels.__main__ import _cuda

    gpu: dict[str, Any] = {}
    if timing.has_gpu():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": timing.cache_bytes(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": facts._output(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ),
        }
    native = {"loads": _native.WHY_NOT is None, "why_not": _native.WHY_NOT, "cuda": _cuda()}
    return {"facts": facts.facts(), "gpu": gpu, "native": native}


def test(job: Job) -> None:
    """The registry's tests on this device, many side by side; kernels compile in parallel so."""
    tests.run(job.store, job.wants, job.left(), job.dry)


def bench(job: Job) -> None:
    """Every op × bench case × dtype, forward and backward, against eager peers."""
    _measured(job, compiled=False)


def compiled(job: Job) -> None:
    """The same cells against the peers under torch.compile."""
    _measured(job, compiled=True)


def _measured(job: Job, compiled: bool) -> None:
    roof = _roof(job)
    todo = [
        (cell, state)
        for cell in cells.ordered(job.dry)
        for state in [store.digest(store.depends(cell.op.name))]
        if job.wants(str(cell)) and not job.store.has(str(cell), state)
    ]
    if todo and not (compiled or job.dry):
        warm.all_cores([str(cell) for cell, _ in todo], min(120.0, job.left() / 3))
    for number, (cell, state) in enumerate(todo):
        if job.left() < 3:
            print(f"no time left for {len(todo) - number} cells", flush=True)
            return
        seconds = max(0.3, min(3.0, job.left() / (len(todo) - number) / 3))

        def rows(cell: Any = cell, seconds: float = seconds) -> dict[str, Any]:
            return {"rows": [asdict(row) for row in cells.measure(cell, roof, seconds, compiled)]}

        job.attempt(str(cell), state, rows)


def _roof(job: Job) -> dict[str, Any]:
    """As measured before in the same way, else now; where that fails, cells go without a limit."""
    state = _roofs_state()
    for _ in range(2):
        for cell in store.load([job.folder / "gpu.jsonl"]):
            if (cell["cell"], cell["hash"]) == ("roofs", state) and cell.get("roof"):
                return dict(cell["roof"])
        _measure_roofs(job, min(10.0, job.left() / 4))
    return {}


def sanitizer(job: Job) -> None:
    """compute-sanitizer over the native object's CUDA code, where the tool is and works."""
    from tokenkernels.__main__ import _cuda

    state = store.digest(["csrc/cuda/*", "bench/gpu/sections.py"])
    here = _cuda()
    if shutil.which("compute-sanitizer") is None:
        here = "no compute-sanitizer in PATH"
    elif here == "runs on this GPU":
        for tool in ("memcheck", "racecheck"):
            seconds = min(90.0, job.left() / 2)
            job.store.add(f"sanitizer {tool}", state, **tests.sanitized(tool, seconds))
        return
    job.store.add("sanitizer", state, result=f"unavailable: {here}")


def models(job: Job) -> None:
    """SiT dense and slimmed on this device, as its authors formulated it and as we run it."""
    from bench.gpu import models as slimmed

    state = store.digest(MODELS)
    for name, run in slimmed.cells(job.dry):
        if not job.wants(name) or job.store.has(name, state):
            continue
        if job.left() < 3:
            return
        job.attempt(name, state, partial(_recorded, run), HUNG_MODEL)


def _recorded(run: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    return {"records": run()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "section", choices=("machine", "test", "bench", "sanitizer", "models", "compiled")
    )
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--since", type=float, required=True, help="when the whole run began")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    globals()[options.section](Job(options))


if __name__ == "__main__":
    main()
