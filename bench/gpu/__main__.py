"""`python -m bench.gpu --budget 540 --out FOLDER`: everything a GPU can tell, in order of worth.

Every section runs in a process of its own, so that the failure of one leaves the others alone, and
writes each cell as soon as it is done; where it dies it is started again behind the cell it died
of. A cell that was measured before is skipped while the files it depends on are the same. `--only
"test merge_adjacent"` takes the named sections and the cells in whose names the other words stand.
`--dry-run` goes the same ways without a GPU. Nothing here imports torch: this process outlives what
hangs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from bench.gpu import report, store

ROOT = Path(__file__).parents[2]
SECTIONS = ("machine", "test", "bench", "sanitizer", "models", "compiled")
KEPT_SECONDS = 15.0
"""For the last table."""
GRACE = 5.0
"""What a section may take beyond its time before it is killed."""
LEAST = 12.0
"""What a section needs to do anything: it imports torch and starts CUDA."""
WORTH = 40.0
"""Less than that is not worth a start, unless it is all that is left."""
SHARE = {"machine": 0.15, "test": 0.5, "bench": 0.8, "sanitizer": 0.4, "models": 0.6}
"""The most of what is left that a section may take; the last takes all."""
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
"""Under build/gpu: what was compiled stays with the checkout."""


def main() -> int:
    options = _options()
    end = time.monotonic() + options.budget - KEPT_SECONDS
    environment = _environment(options.dry_run) | {"TOKENKERNELS_BACKEND": ""}
    build = None if options.dry_run else _build()
    folder = _folder(options)
    words = options.only.split()
    chosen = [s for s in SECTIONS if s in words] or list(SECTIONS)
    more = [w for w in words if w not in SECTIONS]
    more += ["--out", str(folder), "--since", str(time.time()), *["--dry-run"] * options.dry_run]
    try:
        for section in chosen:
            left = end - time.monotonic()
            if section == "bench":
                _wait(build, min(left / 3, 150))
                left = end - time.monotonic()
            if left < LEAST:
                print(f"== {section}: no time left", flush=True)
                continue
            share = 1.0 if section == chosen[-1] else SHARE[section]
            seconds = max(left * share, min(left, WORTH))
            _section(section, more, time.monotonic() + seconds, folder, environment)
    finally:
        if build is not None:
            _kill(build)
        print(report.write(folder), flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--only", default="", help="sections and words of cells")
    parser.add_argument("--out", default="", help="default: bench/results/<gpu>")
    parser.add_argument("--dry-run", action="store_true", help="on this CPU, interpreted")
    return parser.parse_args()


def _folder(options: argparse.Namespace) -> Path:
    """Where cells go; an empty folder begins with those that are committed for this GPU."""
    committed = store.results_folder(options.dry_run)
    folder = Path(options.out).resolve() if options.out else committed
    folder.mkdir(parents=True, exist_ok=True)
    known = committed / "gpu.jsonl"
    if not options.dry_run and known.exists() and not (folder / "gpu.jsonl").exists():
        shutil.copyfile(known, folder / "gpu.jsonl")
    return folder


def _environment(dry: bool) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
        "PYTHONUNBUFFERED": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        # Graphs and the profiler serve one process: CUPTI stays as it was when it was first asked.
        "TEARDOWN_CUPTI": "0",
        "DISABLE_CUPTI_LAZY_REINIT": "1",
    }
    if dry:
        return environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, folder in CACHES.items():
        environment.setdefault(name, str(ROOT / "build" / "gpu" / folder))
    return environment


def _build() -> subprocess.Popen[bytes] | None:
    """The native object, built beside everything else where it was not carried in. It appears in
    its place whole, after all of it is built.
    """
    if (ROOT / "tokenkernels" / "_torch.so").exists():
        return None
    command = ["nice", sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "gpu.log", "wb") as log, suppress(OSError):
        return subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    return None


def _wait(build: subprocess.Popen[bytes] | None, seconds: float) -> None:
    """Nothing is timed beside a build; one that takes longer is given up."""
    if build is not None:
        with suppress(subprocess.TimeoutExpired):
            build.wait(max(seconds, 0))
        _kill(build)


def _kill(process: subprocess.Popen[bytes]) -> int:
    """Ends the process, and whatever it started and left."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _section(
    section: str, more: list[str], until: float, folder: Path, environment: dict[str, str]
) -> None:
    """Started again where it died, as long as it gets on: no cell is tried twice."""
    cells = folder / "gpu.jsonl"
    status, before = 1, -1
    while status and until - time.monotonic() > LEAST:
        size = cells.stat().st_size if cells.exists() else 0
        if size == before:
            return
        before = size
        status = _run(section, more, until - time.monotonic(), folder, environment)


def _run(
    section: str, more: list[str], seconds: float, folder: Path, environment: dict[str, str]
) -> int:
    """One section, killed a little after its time; what it wrote until then stays."""
    print(f"== {section}: up to {seconds:.0f} s", flush=True)
    command = [sys.executable, "-m", "bench.gpu.sections", section, *more]
    command += ["--seconds", str(seconds)]
    log = folder / "gpu.log"
    start = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n== {section}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            status = 0  # no failure: its time is up
        finally:
            _kill(process)
    print(f"   {section}: status {status}, {time.monotonic() - start:.0f} s", flush=True)
    if status:
        tail = log.read_text(errors="replace").splitlines()[-12:]
        print("\n".join("   | " + re.sub(r"\s+$", "", line)[:200] for line in tail), flush=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
