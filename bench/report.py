"""Draws a run on the terminal, as Markdown and as one HTML page with plots; `python -m bench.report
NEW.json [OLD.json]` does so later.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import tables
from bench.plots import figures
from bench.tables import Result, Row, Table

if TYPE_CHECKING:  # where pages are written, nothing need be there to draw on a terminal
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table as RichTable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 12px;
  color: #222; }
table { border-collapse: collapse; margin: 1em 0 2em; font-size: 13px; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #ddd; }
th.text, td.text { text-align: left; }
tr:hover { background: #f4f7fb; }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { paint-order: stroke; stroke: white; stroke-width: 3px; }
"""
EXPLANATION = (
    "Everyone passed a comparison on the very input that is timed: our kernels the op's own, peers "
    "too, unless they break ties or round in another way; then bench/peers says how they are held. "
    "A compiled peer that no time was left for is listed below as left out. All contenders of a "
    "cell take turns in random order, outputs are allocated inside, figures are medians. Roof: the "
    "time that a copy (and a read) of the bytes that the op must move takes, in turns with the op, "
    "or its arithmetic at the rate of the fastest matrix product, whichever is longer. ×: time of "
    "the fastest peer over ours. Extra memory, of these two: peak of resident memory during one "
    "call, beyond inputs and outputs."
)


def console() -> Console:
    from rich.console import Console

    return Console(width=None if Console().is_terminal else 180)


def progress(on: Console) -> Progress:
    from rich import progress as bar

    columns = (
        bar.TextColumn("{task.description}"),
        bar.BarColumn(),
        bar.MofNCompleteColumn(),
        bar.TimeElapsedColumn(),
        bar.TimeRemainingColumn(),
    )
    return bar.Progress(*columns, console=on, transient=True)


def headline(result: Result) -> str:
    facts = result["machine"]
    return (
        f"{facts['cpu']} · {facts['threads']} threads · {facts['instruction_set']} · "
        f"torch {facts['versions']['torch']} · commit {facts['commit']}"
    )


def roofs(result: Result) -> RichTable:
    return drawn(tables.roofs(result["roof"]))


def line(cell: str, rows: list[Row]) -> str:
    """One cell, as soon as it is done."""
    ours, peer = tables.best(rows, "ours"), tables.best(rows, "peer", "reference")
    failed = [row["contender"] for row in rows if row["failed"]]
    parts = [f"{cell:<72}"]
    if ours:
        parts.append(f"{tables.number(ours['ms']):>7} ms")
    if ours and peer:
        parts.append(f"[bold]× {tables.number(ours['times_fastest_peer'])}[/bold]")
        parts.append(f"{peer['contender']} {tables.number(peer['ms'])} ms")
    if ours and ours["roof_percent"]:
        parts.append(f"{ours['roof_percent']:.0f} % of roof")
    if ours and (ours.get("others_percent") or 0) > tables.DISTURBED:
        parts.append(f"[yellow]others used {ours['others_percent']:.0f} % of a processor[/yellow]")
    if not ours:
        parts.append(next((row["left_out"] for row in rows if row["left_out"]), "not timed"))
    return "  ".join(parts) + (f"  [red]failed: {', '.join(failed)}[/red]" if failed else "")


def drawn(table: Table) -> RichTable:
    from rich.table import Table as RichTable

    rich = RichTable(title=table.title, title_justify="left")
    for place, column in enumerate(table.columns):
        rich.add_column(column, justify="right" if table.is_number(place) else "left")
    for row in table.rows:
        rich.add_row(*row)
    return rich


def show(on: Console, result: Result) -> None:
    for table in (tables.summary(result), *tables.sections(result), *tables.not_timed(result)):
        if table.rows:
            on.print(drawn(table))


def write(result: Result, folder: Path, old: Result | None = None) -> list[Path]:
    """Writes report.md and report.html; with an older run, both begin with the comparison."""
    first = [tables.comparison(result, old)] if old else []
    last = [
        *tables.details(result),
        *tables.not_timed(result),
        tables.roofs(result["roof"]),
        tables.machine(result),
    ]
    head, top = [*first, tables.summary(result), *tables.sections(result)], headline(result)
    pages = {
        "report.md": markdown(top, head, last),
        "report.html": page(top, EXPLANATION, head, plots(result), last),
    }
    for name, text in pages.items():
        (folder / name).write_text(text)
    return [folder / name for name in pages]


def markdown(top: str, head: Iterable[Table], last: Iterable[Table]) -> str:
    parts = ["# Benchmark", top, EXPLANATION]
    for table in (*head, *last):
        if table.rows:
            parts += [f"## {table.title}", as_markdown(table)]
    return "\n\n".join(parts) + "\n"


def as_markdown(table: Table) -> str:
    rule = ["---:" if table.is_number(place) else "---" for place in range(len(table.columns))]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [table.columns, rule, *rows])


def page(
    top: str, explanation: str, head: Iterable[Table], figures: list[str], last: Iterable[Table]
) -> str:
    body = ["<h1>Benchmark</h1>", *(f"<p>{html.escape(text)}</p>" for text in (top, explanation))]
    body += [
        *figures,
        *(_table(table) for table in head if table.rows),
        *(_table(table) for table in last if table.rows),
    ]
    title = "<meta charset='utf-8'><title>tokenkernels benchmark</title>"
    return (
        f"<!doctype html>\n<html lang='en'><head>{title}<style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _table(table: Table) -> str:
    kinds = ["" if table.is_number(p) else " class='text'" for p in range(len(table.columns))]

    def line(tag: str, cells: list[str]) -> str:
        filled = zip(kinds, map(html.escape, cells), strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in filled) + "</tr>"

    rows = [line("th", table.columns), *(line("td", row) for row in table.rows)]
    return f"<h2>{html.escape(table.title)}</h2>\n<table>\n" + "\n".join(rows) + "\n</table>"


def plots(result: Result) -> list[str]:
    cells = tables.by_cell(result["ops"]).values()
    ours = [row for rows in cells if (row := tables.best(rows, "ours"))]
    return figures(ours, result["roof"], result.get("sections", {}).get("models", []))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("new", type=Path, help="the JSON of a run")
    parser.add_argument("old", type=Path, nargs="?", help="an older one to compare it with")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "out", help="folder of the pages"
    )
    options = parser.parse_args()
    new: dict[str, Any] = json.loads(options.new.read_text())
    old = json.loads(options.old.read_text()) if options.old else None
    if old:
        console().print(drawn(tables.comparison(new, old)))
    options.out.mkdir(parents=True, exist_ok=True)
    console().print("Written: " + ", ".join(map(str, write(new, options.out, old))))


if __name__ == "__main__":
    main()
