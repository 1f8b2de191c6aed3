"""The sections of `python -m bench.gpu`, each in a process of its own."""

from __future__ import annotations

import argparse
import shutil
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu import cells, roofs, store, tests, timing


class Job:
    """What a section was asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.words, self.dry = options.words, options.dry_run
        self.folder = Path(options.out)
        self.until = time.monotonic() + options.seconds
        self.store = store.Store(self.folder, options.section)

    def left(self) -> float:
        return self.until - time.monotonic()

    def wants(self, cell: str) -> bool:
        return all(word in cell for word in self.words)


def machine(job: Job) -> None:
    """Facts, what doctor says, and the measured roofs."""
    from bench import machine as facts
    from tokenkernels import _native

    state = store.digest(["bench/gpu/roofs.py", "bench/gpu/timing.py"])
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
    native = {"loads": _native.WHY_NOT is None, "why_not": _native.WHY_NOT, "cuda": _filled()}
    job.store.add("facts", state, facts=facts.facts(), gpu=gpu, native=native)
    if not job.store.has("roofs", state):
        job.store.add("roofs", state, roof=roofs.measure(min(25.0, job.left() / 2)))


def _filled() -> str:
    """Whether the CUDA code of the native object runs here."""
    from tokenkernels.__main__ import _cuda

    return _cuda()


def test(job: Job) -> None:
    """The registry's tests on this device, the ops side by side; kernels compile in parallel so."""
    tests.run(job.store, job.wants, job.left(), job.dry)


def bench(job: Job) -> None:
    """Every op × bench case × dtype, forward and backward, against eager peers."""
    _measured(job, compiled=False)


def compiled(job: Job) -> None:
    """The same cells against the peers under torch.compile."""
    _measured(job, compiled=True)


def _measured(job: Job, compiled: bool) -> None:
    roof = _roof(job)
    todo = [cell for cell in cells.ordered(job.dry) if job.wants(str(cell))]
    for number, cell in enumerate(todo):
        state = store.digest(store.depends(cell.op.name))
        if job.store.has(str(cell), state):
            continue
        if job.left() < 3:
            print(f"no time left for {len(todo) - number} cells", flush=True)
            return
        seconds = max(0.3, min(3.0, job.left() / (len(todo) - number) / 3))
        try:
            rows = [asdict(row) for row in cells.measure(cell, roof, seconds, compiled)]
            job.store.add(str(cell), state, rows=rows)
        except Exception as error:  # the next cell may do better
            traceback.print_exc()
            job.store.add(str(cell), state, error=f"{type(error).__name__}: {error}"[:300])
            if "CUDA error" in str(error):
                raise  # nothing runs in this process any more


def _roof(job: Job) -> dict[str, Any]:
    for cell in store.before(job.folder):
        if cell["cell"] == "roofs":
            return dict(cell["roof"])
    return roofs.measure(min(10.0, job.left() / 4))


def sanitizer(job: Job) -> None:
    """compute-sanitizer over the native object's CUDA code, where the tool is and works."""
    state = store.digest(["csrc/cuda/*", "bench/gpu/sections.py"])
    if shutil.which("compute-sanitizer") is None:
        job.store.add("sanitizer", state, result="unavailable: no compute-sanitizer in PATH")
        return
    for tool in ("memcheck", "racecheck"):
        job.store.add(f"sanitizer {tool}", state, **tests.sanitized(tool, min(90, job.left())))


def models(job: Job) -> None:
    """SiT dense and slimmed on this device, as its authors formulated it and as we run it."""
    from bench.gpu import models as slimmed

    state = store.digest(["python/tokenmodels/sit/*.py", "tokenkernels/triton/*.py"])
    for name, run in slimmed.cells(job.dry):
        if not job.wants(name) or job.store.has(name, state):
            continue
        if job.left() < 3:
            return
        try:
            job.store.add(name, state, records=run())
        except Exception as error:  # the next model may do better
            traceback.print_exc()
            job.store.add(name, state, error=f"{type(error).__name__}: {error}"[:300])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "section", choices=("machine", "test", "bench", "sanitizer", "models", "compiled")
    )
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    globals()[options.section](Job(options))


if __name__ == "__main__":
    main()
