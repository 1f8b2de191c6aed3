"""What a run says, as plain tables of text: the terminal, Markdown and HTML only draw them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_NUMBER = re.compile(r"-?[0-9.]+%?")
DISTURBED = 10.0
"""Percent of one processor that others may use while something is timed."""
Result = dict[str, Any]
Row = dict[str, Any]


@dataclass
class Table:
    """A title, the names of the columns, the lines."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def is_number(self, place: int) -> bool:
        """Whether a column holds nothing but numbers, with or without a unit behind them."""
        cells = [row[place] for row in self.rows if row[place]]
        return bool(cells) and all(_NUMBER.fullmatch(cell.split()[0]) for cell in cells)


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """Three significant digits, no exponent; nothing where there is no value."""
    if value is None:
        return ""
    if value == 0:
        return f"0{unit}"
    magnitude = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, digits - magnitude)}f}{unit}"


def machine(result: Result) -> Table:
    facts = result["machine"] | {"mode": "quick" if result["quick"] else "full"}
    flat = {key: value for key, value in facts.items() if not isinstance(value, dict)}
    for group in ("versions", "malloc"):
        flat |= {key: value for key, value in facts[group].items() if value}
    return Table(
        "Machine",
        ["fact", "value"],
        [[key, str(value)] for key, value in flat.items() if value is not None],
    )


def roofs(roof: dict[str, Any]) -> Table:
    """Bandwidths by the bytes moved, rates of arithmetic by dtype, what a launch costs; of a CPU or
    a GPU.
    """
    threads = f", {roof['threads']} threads" if "threads" in roof else ""
    rows = [
        [f"{kind}, {cache}, {int(size) // 2**20} MiB moved", number(rate / 1e9, unit=" GB/s")]
        for cache in ("cold", "warm")
        for kind, rates in roof.get(cache, {}).items()
        for size, rate in rates.items()
    ]
    for key, where in (("gemm", threads), ("gemm_one_thread", ", 1 thread")):
        rows += [
            [f"matrix product, {dtype}{where}", _many(rate, "FLOP/s")]
            for dtype, rate in roof.get(key, {}).items()
        ]
    for key, what, unit in (
        ("fma", "multiply-adds, float32", "FLOP/s"),
        ("exp", "exponentials", "/s"),
    ):
        if key in roof:
            rows.append([what, _many(roof[key], unit)])
    for key, what in (("launch_us", "a launch"), ("eager_launch_us", "a launch by itself")):
        if key in roof:
            rows.append([what, number(roof[key], unit=" µs")])
    return Table("Measured roofs", ["what", "rate"], rows)


def _many(value: float, unit: str) -> str:
    size, letter = (1e12, "T") if value >= 1e13 else (1e9, "G")
    return number(value / size, unit=f" {letter}{unit}")


def by_cell(rows: Iterable[Row]) -> dict[tuple[str, str, str, bool], list[Row]]:
    """(op, case, dtype, gradient) → its rows."""
    cells: dict[tuple[str, str, str, bool], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["op"], row["case"], row["dtype"], row["gradient"]), []).append(row)
    return cells


def best(rows: Iterable[Row], *roles: str) -> Row | None:
    """The fastest row of the first of these roles that has one."""
    for role in roles:
        timed = [row for row in rows if row["role"] == role and row["ms"]]
        if timed:
            return min(timed, key=lambda row: row["ms"])
    return None


def summary(result: Result) -> Table:
    """One line per cell: ours, the fastest peer, their ratio."""
    columns = [
        "op",
        "case",
        "dtype",
        "ours ms",
        "% of roof",
        "fastest peer",
        "peer ms",
        "×",
        "extra MB",
        "peer's MB",
    ]
    lines = []
    for (op, case, dtype, gradient), rows in by_cell(result["ops"]).items():
        ours, peer = best(rows, "ours"), best(rows, "peer", "reference")
        if ours is None:
            continue
        roof = number(ours["roof_percent"], 2) + (
            " " + ours["bound"][:3] if ours["roof_percent"] else ""
        )
        lines.append(
            [
                op,
                case + gradient * " +backward",
                dtype,
                number(ours["ms"]),
                roof,
            ]
            + ([peer["contender"], number(peer["ms"])] if peer else ["", ""])
            + [number(ours["times_fastest_peer"]), _megabytes(ours), _megabytes(peer)]
        )
    return Table("Ops against the fastest peer", columns, lines)


def details(result: Result) -> list[Table]:
    """Per op, everyone who was timed."""
    columns = [
        "case",
        "dtype",
        "who",
        "ms",
        "MB",
        "MFLOP",
        "GB/s",
        "% of roof",
        "× fastest peer",
        "extra MB",
        "note",
    ]
    tables: dict[str, Table] = {}
    for (op, case, dtype, gradient), rows in by_cell(result["ops"]).items():
        table = tables.setdefault(op, Table(op, columns, []))
        for row in sorted((row for row in rows if row["ms"]), key=lambda row: row["ms"]):
            table.rows.append(
                [case + gradient * " +backward", dtype, row["contender"], number(row["ms"])]
                + [number(row[key] and row[key] / 1e6) for key in ("bytes", "flops")]
                + [
                    number(row["gb_per_s"]),
                    number(row["roof_percent"], 2),
                    number(row["times_fastest_peer"]),
                ]
                + [_megabytes(row), row["note"]]
            )
    return [table for table in tables.values() if table.rows]


def of_records(title: str, records: list[dict[str, Any]]) -> Table:
    """A column per key."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    shown = [
        [
            number(v) if isinstance(v, float) else str(v)
            for v in (record.get(key, "") for key in columns)
        ]
        for record in records
    ]
    return Table(title, columns, shown)


def sections(result: Result) -> list[Table]:
    """What was measured beside the ops."""
    found = result.get("sections", {})
    return [of_records(name.capitalize(), records) for name, records in found.items()]


def not_timed(result: Result) -> list[Table]:
    """Who failed its comparison and what was left out, with reasons; those alike share a line."""
    tables = []
    for key, title in (("failed", "Failed, so not timed"), ("left_out", "Left out")):
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in result["ops"]:
            if row[key]:
                cell = f"{row['case']} {row['dtype']}" + row["gradient"] * " +backward"
                reasons.setdefault((f"{row['op']}: {row['contender']}", row[key]), []).append(cell)
        lines = [[who, why, str(len(cells)), cells[0]] for (who, why), cells in reasons.items()]
        if lines:
            tables.append(Table(title, ["who", "why", "cells", "the first"], lines))
    disturbed = [
        [op, case + gradient * " +backward", dtype, f"{ours['others_percent']:.0f}%"]
        for (op, case, dtype, gradient), rows in by_cell(result["ops"]).items()
        if (ours := best(rows, "ours")) and (ours.get("others_percent") or 0) > DISTURBED
    ]
    columns = ["op", "case", "dtype", "of one processor"]
    tables.append(Table("Disturbed: other processes ran meanwhile", columns, disturbed))
    if failures := result.get("sections_left_out"):
        tables.append(Table("Not measured", ["section", "why"], [[*x] for x in failures.items()]))
    return tables


def comparison(new: Result, old: Result) -> Table:
    """Two runs, cell by cell: our time and our distance to the fastest peer of the same run, before
    and after.
    """
    columns = ["op", "case", "dtype", "before ms", "after ms", "faster", "× before", "× after"]
    before, lines = by_cell(old["ops"]), []
    for cell, rows in by_cell(new["ops"]).items():
        ours, was = best(rows, "ours"), best(before.get(cell, []), "ours")
        if ours and was:
            op, case, dtype, gradient = cell
            lines.append(
                [
                    op,
                    case + gradient * " +backward",
                    dtype,
                    number(was["ms"]),
                    number(ours["ms"]),
                    number(was["ms"] / ours["ms"]),
                ]
                + [number(run["times_fastest_peer"]) for run in (was, ours)]
            )
    sides = (f"{run['machine']['commit']} ({run['machine']['cpu']})" for run in (old, new))
    return Table(" → ".join(sides), columns, lines)


def _megabytes(row: Row | None) -> str:
    return "" if row is None or row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.1f}"
