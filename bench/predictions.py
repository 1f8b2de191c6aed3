"""The committed predictions for an H200, and the outcomes that are held against them. Imports no
torch, so whoever only reads them starts at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "results" / "predictions-h200.json"
Times = dict[tuple[str, str], float]
"""(cell, backend) → microseconds."""


@dataclass(frozen=True)
class Prediction:
    """Of one cell and backend. Of a gradient bytes are those of all tensors that its launches are
    given, flops twice those of the forward call, which goes before and is counted in.
    """

    op: str
    case: str
    dtype: str
    gradient: bool
    backend: str
    launches: int
    bytes: float
    flops: float
    exponentials: float
    compares: float
    blocks: int | None
    waves: float | None
    limit: str
    limit_us: float
    predicted_us: float

    @property
    def cell(self) -> str:
        """As the bench names it."""
        return f"{self.op} · {self.case} · {self.dtype}" + self.gradient * " · +backward"


def known() -> list[Prediction]:
    """What was committed."""
    return [Prediction(**row) for row in json.loads(FILE.read_text())["predictions"]]


def predicted() -> Times:
    return {(row.cell, row.backend): row.predicted_us for row in known()}


def measured() -> Times:
    """From the runs on an H200 that were committed."""
    found: Times = {}
    for path in sorted(FILE.parent.glob("*h200*/gpu.jsonl")):
        for line in path.read_text().splitlines():
            cell = json.loads(line)
            for row in cell.get("rows") or []:
                if row["role"] == "ours" and row["ms"]:
                    found[cell["cell"], row["contender"]] = 1e3 * row["ms"]
    return found
