"""The tests on a GPU: one pytest process per op, many at once, so that their kernels compile in
parallel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as Xml
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu import store
from tokenkernels import ops
from tokenkernels._op import OPS

ROOT = Path(__file__).parents[2]
FILES = ("tests/test_ops.py", "tests/test_ops_torch.py")
DRY_WORDS = "test_truth and triton and fp32"


def run(keep: store.Store, wants: Callable[[str], bool], seconds: float, dry: bool) -> None:
    """Starts as many as there are cores, collects them as they end, stops them when time is up."""
    ops.load()
    until = time.monotonic() + seconds - 5
    waiting = [name for name in OPS if wants(name) and not keep.has(name, _state(name))]
    waiting = waiting[:1] if dry else waiting
    running: dict[str, subprocess.Popen[bytes]] = {}
    folder = keep.path.parent / "tests"
    folder.mkdir(exist_ok=True)
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    while (waiting or running) and time.monotonic() < until:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            running[name] = _started(name, folder, dry)
        time.sleep(0.2)
        for name in [n for n, process in running.items() if process.poll() is not None]:
            status = running.pop(name).returncode
            keep.add(name, _state(name), **_read(folder / f"{name}.xml", status))
    for name, process in running.items():
        process.kill()
        keep.add(name, _state(name), error="no time left", **_log(folder / f"{name}.log"))
    shutil.rmtree(folder, ignore_errors=True)


def _state(op: str) -> str:
    return store.digest([*store.depends(op), "tests/test_ops*.py", "tests/trial.py"])


def _started(op: str, folder: Path, dry: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", *FILES, "-q", *["-x"] * dry]
    command += ["--op", op, f"--junitxml={folder / op}.xml", "-p", "no:cacheprovider", "-rN"]
    command += ["-k", DRY_WORDS] if dry else []
    with open(folder / f"{op}.log", "wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def _read(path: Path, status: int) -> dict[str, Any]:
    """Counts, and the first line of what failed."""
    if not path.exists():
        return {"error": f"pytest ended with {status}", **_log(path.with_suffix(".log"))}
    suite = Xml.parse(path).getroot().find("testsuite")
    assert suite is not None
    failed = {
        case.get("name", ""): (problem.get("message") or "")[:300]
        for case in suite.iter("testcase")
        for problem in case
        if problem.tag in ("failure", "error")
    }
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return {**counts, "seconds": float(suite.get("time", 0)), "failed": failed} | (
        {"error": f"{len(failed)} failed"} if failed else {}
    )


def _log(path: Path) -> dict[str, str]:
    return {"log": path.read_text(errors="replace")[-2000:] if path.exists() else ""}


def sanitized(tool: str, seconds: float) -> dict[str, Any]:
    """What compute-sanitizer says of the CUDA code that `doctor` runs."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
    command += ["-m", "tokenkernels", "doctor"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"result": f"unavailable: no end within {seconds:.0f} s"}
    text = done.stdout + done.stderr
    summary = re.findall(r"ERROR SUMMARY:.*|Device not supported.*", text)
    working = summary and done.returncode in (0, 9)
    return {"result": summary[-1] if working else f"unavailable: {text[-300:]}"}
