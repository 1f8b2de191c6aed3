"""What the cells say: a short table for the terminal, one JSON and one HTML page of the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import predictions
from bench import report as drawing
from bench import tables as shared
from bench.gpu import store
from bench.plots import figures
from bench.tables import Table, number

EXPLANATION = (
    "Everyone passed a comparison on the very input that is timed. Times are medians of replays of "
    "a CUDA graph, over inputs that rotate, together twice as large as the cache, and, warm, over "
    "one input again and again. The limit is the longest of: the bytes that the op must move, at "
    "the bandwidth measured for so many bytes, cold or warm; its arithmetic and exponentials at "
    "the measured rates, in float32 by the fastest of products, multiply-adds and three products "
    "of 16-bit parts; the op's launches. Predicted: by a model, for an H200, before any "
    "measurement. ×: time of the fastest peer over ours."
)


def write(folder: Path) -> str:
    """Writes gpu.json and gpu.html from gpu.jsonl; returns what stands last on the terminal."""
    cells = store.load([folder / "gpu.jsonl"])
    found = [*machine(cells), *tests(cells), *ops(cells), *models(cells), *failed(cells)]
    found = [table for table in found if table.rows]
    page = drawing.page("What one GPU told.", EXPLANATION, found, plots(cells), [])
    for name, content in (("gpu.json", json.dumps(cells, indent=1) + "\n"), ("gpu.html", page)):
        (folder / f"{name}.new").write_text(content)
        (folder / f"{name}.new").replace(folder / name)
    return "\n".join(text(table) for table in found) + f"\nWritten: {folder}/gpu.json, gpu.html"


def plots(cells: list[store.Cell]) -> list[str]:
    """As those of a CPU: our faster backend in each cell, against the fastest of all peers that
    were measured in it, compiled ones too.
    """
    known = sorted((c for c in cells if c.get("roof")), key=lambda c: c.get("when", 0.0))
    roof: dict[str, Any] = known[-1]["roof"] if known else {}
    met: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        met.setdefault(cell["cell"], []).extend(r for r in cell.get("rows") or [] if r["ms"])
    found = []
    for name, rows in met.items():
        ours = [row for row in rows if row["role"] == "ours"]
        peers = [row["ms"] for row in rows if row["role"] == "peer"]
        if ours:
            op, case, dtype, *gradient = name.split(" · ")
            best = min(ours, key=lambda row: float(row["ms"]))
            ratio = min(peers) / best["ms"] if peers else None
            named = {"op": op, "case": case, "dtype": dtype, "gradient": bool(gradient)}
            found.append(best | named | {"times_fastest_peer": ratio})
    records = [record for cell in cells for record in cell.get("records") or []]
    return figures(found, roof, records)


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
        if roof := cell.get("roof"):
            lines += shared.roofs(roof).rows
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
    """Ours and the fastest peer, a line per cell and backend, beside what was predicted."""
    columns = ["cell", "backend", "µs", "limit µs", "% of limit", "warm µs", "% of warm limit"]
    columns += ["predicted µs", "µs / predicted", "launches", "eager µs", "extra MB"]
    table = Table("Ops", [*columns, "fastest peer", "×"], [])
    foretold = predictions.predicted()
    for cell in cells:
        rows: list[dict[str, Any]] = cell.get("rows") or []
        peers = [row for row in rows if row["role"] == "peer" and row["ms"]]
        best = min(peers, key=lambda row: row["ms"]) if peers else None
        for row in rows:
            if row["role"] == "ours" and row["ms"]:
                us = foretold.get((cell["cell"], row["contender"]))
                table.rows.append(
                    [
                        f"{cell['section']}: {cell['cell']}",
                        row["contender"],
                        _us(row["ms"]),
                        _us(row["limit_ms"]),
                        number(row["roof_percent"], 2),
                        _us(row["warm_ms"]),
                        number(row["warm_roof_percent"], 2),
                        number(us),
                        number(us and 1e3 * row["ms"] / us),
                        str(row["launches"] or ""),
                        _us(row["eager_ms"]),
                        number(row["extra_bytes"] and row["extra_bytes"] / 1e6),
                        best["contender"] if best else "",
                        number(row["times_fastest_peer"]),
                    ]
                )
    return [table]


def _us(ms: float | None) -> str:
    return number(ms and 1e3 * ms)


def models(cells: list[store.Cell]) -> list[Table]:
    records = [record for cell in cells for record in cell.get("records") or []]
    return [shared.of_records("Models", records)]


def failed(cells: list[store.Cell]) -> list[Table]:
    lines = [[c["section"], c["cell"], str(c["error"])[:120]] for c in cells if c.get("error")]
    for cell in cells:
        for row in cell.get("rows") or []:
            if row["failed"]:
                where = f"{cell['cell']}: {row['contender']}"
                lines.append([cell["section"], where, row["failed"][:120]])
    return [Table("Failed", ["section", "cell", "why"], lines)]
