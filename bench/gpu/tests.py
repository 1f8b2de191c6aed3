"""The tests on a GPU: many pytest processes at once, so that their kernels compile in parallel.

A process tries a part of one op's tests on a share of its cases; parts of most worth come first.
What became of each test is known at once, so nothing is lost of a process that is killed, and one
that dies or hangs is started again behind the test it died of.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu import recorder, store
from tokenkernels import ops
from tokenkernels._op import OPS

ROOT = Path(__file__).parents[2]
OPS_FILE, VALUES = "tests/test_ops.py", "test_truth or test_gradient or test_errors"
PARTS: dict[str, tuple[list[str], str, int]] = {
    "values": ([OPS_FILE], VALUES, 12),
    "graphs": (["tests/test_on_gpu.py"], "", 24),
    "properties": ([OPS_FILE], f"not ({VALUES})", 10),
    "torch": (["tests/test_ops_torch.py", "tests/test_triton.py"], "not ahead_of_time", 16),
}
"""Files, which of their tests, and how many cases a process takes, whose start takes seconds; in
order of worth.
"""
DRY_WORDS = "test_truth and triton and fp32"
HUNG = 90.0
"""Seconds after which a test is taken for hung; it may compile ten kernels beside others."""


@dataclass
class Process:
    """One pytest process, and those that took its place."""

    op: str
    part: str
    share: str
    folder: Path
    first: bool = True
    """Whether it also tries what concerns no op, where that falls to its share."""
    running: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    known: int = -1
    killed: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.op} {self.part} {self.share}"

    @property
    def record(self) -> Path:
        return self.folder / (self.name.replace("/", "of") + ".jsonl")

    def start(self, dry: bool) -> None:
        files, words, _ = PARTS[self.part]
        command = [sys.executable, "-m", "pytest", *files, "-q", "--op", self.op, "--triton", "all"]
        command += ["-p", "bench.gpu.recorder", "--record", str(self.record), "--share", self.share]
        command += ["-p", "no:cacheprovider", "-k", DRY_WORDS if dry else words]
        command += ["--without-general"] * (not self.first)
        with open(self.record.with_suffix(".log"), "wb") as log:
            self.running = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        self.started, self.known = time.time(), len(recorder.read(self.record))

    def ended(self, dry: bool) -> bool:
        """Whether it is done. One that hangs is killed; one that died is started again, if only it
        had got any further.
        """
        assert self.running is not None
        status = self.running.poll()
        tests = recorder.read(self.record)
        if status is None:
            if time.time() - max([self.started, *(t["when"] for t in tests)]) < HUNG:
                return False
            self.stop()
            self.killed += [t["id"] for t in tests if t.get("outcome") == "begun"]
        elif status in (0, 1, 5) or len(tests) <= self.known:
            return True
        self.start(dry)
        return False

    def stop(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.wait()

    def result(self, out_of_time: bool = False) -> dict[str, Any]:
        """Counts, and the words of what failed."""
        tests = recorder.read(self.record)
        each = {t["id"]: t for t in tests if t["id"]}
        wanted = sum(t.get("collected", 0) for t in tests)
        count = {
            kind: sum(t["outcome"] == kind for t in each.values()) for kind in ("passed", "skipped")
        }
        failed = {
            name: t.get("problem") or ("hung" if name in self.killed else "the process died")
            for name, t in each.items()
            if t["outcome"] == "failed" or (t["outcome"] == "begun" and not out_of_time)
        }
        done = sum(count.values()) + len(failed)
        problem = f"{len(failed)} failed" if failed else ""
        if done < wanted or not tests:
            reason = "no time left" if out_of_time else "pytest ended early"
            problem = f"{problem} {reason} after {done} of {wanted} tests".strip()
        seconds = sum(t.get("seconds", 0.0) for t in each.values())
        found = {"tests": done, **count, "seconds": seconds, "failed": failed}
        return found | ({"error": problem, "log": self._log()} if problem else {})

    def _log(self) -> str:
        path = self.record.with_suffix(".log")
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""


def run(keep: store.Store, wants: Callable[[str], bool], seconds: float, dry: bool) -> None:
    """Starts as many as there are cores, collects them as they end, stops them when time is up."""
    until = time.monotonic() + seconds - 3
    folder = Path(tempfile.mkdtemp(prefix="tests"))
    waiting = [p for p in processes(folder) if wants(p.name) and not keep.has(p.name, _state(p.op))]
    waiting = waiting[:1] if dry else waiting
    running: list[Process] = []
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    try:
        while (waiting or running) and time.monotonic() < until:
            while waiting and len(running) < workers:
                running.append(waiting.pop(0))
                running[-1].start(dry)
            time.sleep(0.2)
            for process in [p for p in running if p.ended(dry)]:
                running.remove(process)
                keep.add(process.name, _state(process.op), **process.result())
        for process in running:
            process.stop()
            keep.add(process.name, _state(process.op), **process.result(out_of_time=True))
    finally:
        for process in running:
            process.stop()
        shutil.rmtree(folder, ignore_errors=True)
    if waiting:
        print(f"no time left for {', '.join(p.name for p in waiting)}", flush=True)


def processes(folder: Path) -> list[Process]:
    """Part after part, of every op; of each op as many as its cases ask for."""
    ops.load()
    found = []
    for part, (_, _, most) in PARTS.items():
        for number, op in enumerate(OPS.values()):
            cases = sum("test" in case.tags for case in op.cases)
            shares = max(1, -(-cases // most))
            found += [
                Process(op.name, part, f"{n + 1}/{shares}", folder, number == 0)
                for n in range(shares)
            ]
    return found


def _state(op: str) -> str:
    files = ["tests/test_o*.py", "tests/test_triton.py", "tests/trial.py", "tests/ahead_of_time.py"]
    return store.digest([*store.depends(op), *files])


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
