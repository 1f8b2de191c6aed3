"""`python -m bench.gpu --budget 540 --out FOLDER`: everything a GPU can tell, in order of worth.

Every section runs in a process of its own, so that the failure of one leaves the others alone, and
writes each cell as soon as it is done. A cell that was measured before is skipped while the files
it depends on are the same. `--only "test merge_adjacent"` takes the named sections and the cells in
whose names the other words stand. `--dry-run` goes the same ways without a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECTIONS = ("machine", "test", "bench", "sanitizer", "models", "compiled")
KEPT_SECONDS = 15.0
"""For the last table."""
SHARE = {"machine": 0.15, "test": 0.5, "bench": 0.8, "sanitizer": 0.4, "models": 0.6}
"""The most of what is left that a section may take; the last takes all."""


def main() -> int:
    options = _options()
    start = time.monotonic()
    environment = _environment(options.dry_run)
    build = None if options.dry_run else _build()
    from bench.gpu import report, store

    folder = Path(options.out) if options.out else store.results_folder(options.dry_run)
    folder.mkdir(parents=True, exist_ok=True)
    words = options.only.split()
    chosen = [s for s in SECTIONS if s in words] or list(SECTIONS)
    filters = [w for w in words if w not in SECTIONS]
    for section in chosen:
        left = options.budget - KEPT_SECONDS - (time.monotonic() - start)
        if left < 5:
            print(f"== {section}: no time left", flush=True)
            continue
        if section == "bench":
            _wait(build, min(left / 3, 200))
        seconds = left if len(chosen) == 1 else left * SHARE.get(section, 1.0)
        _run(section, filters, seconds, folder, options.dry_run, environment)
    if build is not None and build.poll() is None:
        build.terminate()
    print(report.write(folder), flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--only", default="", help="sections and words of cells")
    parser.add_argument("--out", default="", help="default: bench/results/<gpu>")
    parser.add_argument("--dry-run", action="store_true", help="on this CPU, interpreted")
    return parser.parse_args()


def _environment(dry: bool) -> dict[str, str]:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}",
        "PYTHONUNBUFFERED": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _build() -> subprocess.Popen[bytes] | None:
    """The native object, built beside everything else where it was not carried in."""
    if (ROOT / "tokenkernels" / "_torch.so").exists():
        return None
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "gpu.log", "wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def _wait(build: subprocess.Popen[bytes] | None, seconds: float) -> None:
    if build is None:
        return
    try:
        build.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _run(
    section: str,
    filters: list[str],
    seconds: float,
    folder: Path,
    dry: bool,
    environment: dict[str, str],
) -> None:
    """One section, killed a little after its time; what it wrote until then stays."""
    print(f"== {section}: up to {seconds:.0f} s", flush=True)
    command = [sys.executable, "-m", "bench.gpu.sections", section, *filters]
    command += ["--seconds", str(seconds), "--out", str(folder), *["--dry-run"] * dry]
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
            status = process.wait(seconds + 10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            status = process.wait()
    print(f"   {section}: status {status}, {time.monotonic() - start:.0f} s", flush=True)
    if status:
        tail = log.read_text(errors="replace").splitlines()[-12:]
        print("\n".join("   | " + re.sub(r"\s+$", "", line)[:200] for line in tail), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
