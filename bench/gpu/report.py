"""What the cells say: a short table for the terminal, one JSON and one HTML page of the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import report as drawing
from bench.gpu import store
from bench.tables import Table, number


def write(folder: Path) -> str:
    """Writes gpu.json and gpu.html from gpu.jsonl; returns what stands last on the terminal."""
    cells = store.load([folder / "gpu.jsonl"])
    tables = [*machine(cells), *tests(cells), *ops(cells), *models(cells), *failed(cells)]
    tables = [table for table in tables if table.rows]
    page = drawing.page("What one GPU told.", tables, [], [])
    for name, content in (("gpu.json", json.dumps(cells, indent=1) + "\n"), ("gpu.html", page)):
        (folder / f"{name}.new").write_text(content)
        (folder / f"{name}.new").replace(folder / name)
    return "\n".join(text(table) for table in tables) + f"\nWritten: {folder}/gpu.json, gpu.html"


def text(table: Table) -> str:
    """Plain columns: the last thing a log holds must be readable there."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.columns))]
    rows = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(["", table.title, *(row.rstrip() for row in rows)])


def machine(cells: list[store.Cell]) -> list[Table]:
    lines: list[list[str]] = []
    for cell in cells:
        for key, value in (cell.get("gpu") or {}).items():
            lines.append([key, str(value)])
        for key, value in (cell.get("native") or {}).items():
            lines.append([f"native {key}", str(value)])
        roof = cell.get("roof") or {}
        for kind in ("copy", "read"):
            for size, rate in roof.get(kind, {}).items():
                lines.append([f"{kind} {int(size) >> 20} MiB", number(rate / 1e9, unit=" GB/s")])
        for dtype, rate in roof.get("gemm", {}).items():
            lines.append([f"product {dtype}", number(rate / 1e12, unit=" TFLOP/s")])
        for key in ("launch_us", "eager_launch_us"):
            if key in roof:
                lines.append([key, number(roof[key])])
        if cell["section"] == "sanitizer":
            lines.append([cell["cell"], str(cell.get("result"))])
    return [Table("Machine", ["what", "value"], lines)]


def tests(cells: list[store.Cell]) -> list[Table]:
    """A line per op and part of its tests, whose shares are added up."""
    sums: dict[str, dict[str, int]] = {}
    problems: dict[str, list[str]] = {}
    for cell in cells:
        if cell["section"] == "test":
            name = cell["cell"].rsplit(" ", 1)[0]
            total = sums.setdefault(name, dict.fromkeys(("tests", "passed", "skipped"), 0))
            for key in total:
                total[key] += cell.get(key, 0)
            failed = list(cell.get("failed") or {})
            if cell.get("error"):
                problems.setdefault(name, []).append(f"{cell['error']} {''.join(failed[:1])}")
    lines = [
        [name, *map(str, total.values()), "; ".join(problems.get(name, []))[:110]]
        for name, total in sums.items()
    ]
    return [Table("Tests", ["op", "tests", "passed", "skipped", "problem"], lines)]


def ops(cells: list[store.Cell]) -> list[Table]:
    """Ours and the fastest peer, a line per cell and backend."""
    columns = ["cell", "backend", "µs", "limit µs", "% of roof", "launches", "eager µs"]
    columns += ["extra MB", "fastest peer", "×"]
    lines = []
    for cell in cells:
        rows: list[dict[str, Any]] = cell.get("rows") or []
        peers = [row for row in rows if row["role"] == "peer" and row["ms"]]
        best = min(peers, key=lambda row: row["ms"]) if peers else None
        for row in rows:
            if row["role"] == "ours" and row["ms"]:
                lines.append(
                    [
                        f"{cell['section']}: {cell['cell']}",
                        row["contender"],
                        number(1e3 * row["ms"]),
                        number(row["limit_ms"] and 1e3 * row["limit_ms"]),
                        number(row["roof_percent"], 2),
                        str(row["launches"] or ""),
                        number(row["eager_ms"] and 1e3 * row["eager_ms"]),
                        number(row["extra_bytes"] and row["extra_bytes"] / 1e6),
                        best["contender"] if best else "",
                        number(row["times_fastest_peer"]),
                    ]
                )
    title = "Ops; limits of float32 by FMA or three products of 16-bit parts, whichever is faster"
    return [Table(title, columns, lines)]


def models(cells: list[store.Cell]) -> list[Table]:
    records = [record for cell in cells for record in cell.get("records") or []]
    columns = list(dict.fromkeys(key for record in records for key in record))
    lines = [
        [number(v) if isinstance(v, float) else str(v) for v in (r.get(c, "") for c in columns)]
        for r in records
    ]
    return [Table("Models", columns, lines)]


def failed(cells: list[store.Cell]) -> list[Table]:
    lines = [[c["section"], c["cell"], str(c["error"])[:120]] for c in cells if c.get("error")]
    for cell in cells:
        for row in cell.get("rows") or []:
            if row["failed"]:
                where = f"{cell['cell']}: {row['contender']}"
                lines.append([cell["section"], where, row["failed"][:120]])
    return [Table("Failed", ["section", "cell", "why"], lines)]
