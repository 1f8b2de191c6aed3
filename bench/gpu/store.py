"""Where cells are kept: one line of JSON each, and which files a cell depends on."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
Cell = dict[str, Any]


def results_folder(dry: bool = False) -> Path:
    """`bench/results/<gpu>`; where there is none, a folder that is not kept."""
    if dry or not torch.cuda.is_available():
        return ROOT / "bench" / "out" / "gpu"
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
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
        f"tokenkernels/*/{family}*.py",
        f"csrc/cuda/{family}*",
        "csrc/cuda/*.cuh",
        f"bench/peers/{family}*.py",
        "bench/gpu/timing.py",
    ]


class Store:
    """Appends cells to FOLDER/gpu.jsonl, and knows those that are there or were committed."""

    def __init__(self, folder: Path, section: str) -> None:
        self.path, self.section = folder / "gpu.jsonl", section
        known = before(folder)
        self.known = {(c["section"], c["cell"], c["hash"]) for c in known if not c.get("error")}

    def has(self, cell: str, state: str) -> bool:
        return (self.section, cell, state) in self.known

    def add(self, cell: str, state: str, **content: Any) -> None:
        line = {"section": self.section, "cell": cell, "hash": state, "when": time.time()} | content
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{cell}: {content.get('error') or 'done'}", flush=True)


def before(folder: Path) -> list[Cell]:
    """What was measured on this GPU: committed, or in `folder`."""
    committed = [results_folder() / "gpu.jsonl"] * torch.cuda.is_available()
    return load([*committed, folder / "gpu.jsonl"])


def load(paths: Iterable[Path]) -> list[Cell]:
    """All cells; of those measured twice the last."""
    cells: dict[tuple[str, str], Cell] = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                cell = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a process that was killed
            cells[cell["section"], cell["cell"]] = cell
    return list(cells.values())
