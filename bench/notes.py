"""Writes the figures of a committed run into NOTES.md: what the roofs predict for each op, and what
it took; `python -m bench.notes bench/results/NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from bench import report, tables
from bench.tables import Result, Row, Table

PAGE = Path(__file__).parent / "NOTES.md"
BLOCK = re.compile(r"(?<=<!-- figures -->\n).*(?=<!-- end of figures -->)", re.DOTALL)


def figures(result: Result) -> Table:
    """Per op and dtype two cases, forward: the first one, and the one that reaches least."""
    columns = ["op", "case", "dtype", "limit", "predicted ms", "measured ms", "reached"]
    table = Table("Prediction and outcome", columns, [])
    groups: dict[tuple[str, str], list[Row]] = {}
    for (op, _, dtype, _), rows in tables.by_cell(result["ops"]).items():
        ours = tables.best(rows, "ours")
        if ours and ours["roof_percent"]:
            groups.setdefault((op, dtype), []).append(ours)
    for (op, dtype), found in sorted(groups.items(), key=lambda group: group[0][0]):
        worst = min(found, key=lambda row: float(row["roof_percent"]))
        for row in found[:1] + [worst] * (worst is not found[0]):
            table.rows.append(
                [op, row["case"], dtype, row["bound"]]
                + [tables.number(ms) for ms in (row["ms"] * row["roof_percent"] / 100, row["ms"])]
                + [f"{row['roof_percent']:.0f}%"]
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.notes", description=__doc__)
    parser.add_argument("run", type=Path, help="the JSON of a run")
    run = parser.parse_args().run
    result = json.loads(run.read_text())
    facts = result["machine"]
    source = (
        f"From `bench/results/{run.name}`: {facts['cpu']}, {facts['threads']} threads, "
        f"{facts['instruction_set']}, commit {facts['commit']}.\n\n"
    )
    text = source + report.as_markdown(figures(result)) + "\n"
    PAGE.write_text(BLOCK.sub(lambda found: text, PAGE.read_text()))


if __name__ == "__main__":
    main()
