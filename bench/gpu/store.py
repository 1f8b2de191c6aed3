"""Where cells are kept: one line of JSON each, and which files a cell depends on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Cell = dict[str, Any]
BEGUN = "begun and never ended"


def results_folder(dry: bool = False) -> Path:
    """`bench/results/<gpu>`; where there is none, a folder that is not kept."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        name = done.stdout.splitlines()[0].lower().removeprefix("nvidia ")
    except (OSError, subprocess.SubprocessError, IndexError):
        name = ""
    if dry or not name:
        return ROOT / "bench" / "out" / "gpu"
    return ROOT / "bench" / "results" / re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def digest(patterns: Iterable[str]) -> str:
    """The state of all files that match."""
    state = hashlib.sha256()
    for pattern in sorted(patterns):
        for path in sorted(ROOT.glob(pattern)):
            state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:16]


def depends(op: str) -> list[str]:
    """What the figures of an op rest on."""
    family = op.removesuffix("_").removesuffix("_backward")
    return [
        "tokenkernels/triton/_*.py",
        "tokenkernels/ops/_*.py",
        f"tokenkernels/*/{family}*.py",
        f"csrc/cuda/{family}*",
        "csrc/cuda/*.cuh",
        f"bench/peers/{family}*.py",
        "bench/gpu/timing.py",
    ]


class Store:
    """Appends cells to FOLDER/gpu.jsonl, and knows those that need not be tried: done before, or
    failed `since` this run began.
    """

    def __init__(self, folder: Path, section: str, since: float = float("inf")) -> None:
        self.path, self.section = folder / "gpu.jsonl", section
        self.known = {
            (c["section"], c["cell"], c["hash"])
            for c in load([self.path])
            if not c.get("error") or c.get("when", 0.0) >= since
        }
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._append("\n")  # behind the half line of a process that was killed

    def has(self, cell: str, state: str) -> bool:
        return (self.section, cell, state) in self.known

    def add(self, cell: str, state: str, **content: Any) -> None:
        line = {"section": self.section, "cell": cell, "hash": state, "when": time.time()} | content
        self._append(json.dumps(line, default=str) + "\n")
        print(f"{cell}: {content.get('error') or 'done'}", flush=True)

    def _append(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def load(paths: Iterable[Path]) -> list[Cell]:
    """All cells; of those measured twice the last."""
    cells: dict[tuple[str, str], Cell] = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                cell = json.loads(line)
            except json.JSONDecodeError:
                continue  # half a line of a process that was killed
            cells[cell["section"], cell["cell"]] = cell
    return list(cells.values())
