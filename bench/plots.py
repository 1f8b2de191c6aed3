"""The plots of a run: every kernel under the measured roofs, its time against the fastest peer's,
and what methods save against what they save in theory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench import svg
from bench.tables import Row, number

if TYPE_CHECKING:
    from bench.roofline import Roof

COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#555555",
    "#bcbd22", "#17becf", "#0b3d91", "#b8860b", "#006d5b", "#a01060", "#7fb800", "#c08497",
)  # fmt: skip
"""Of the ops, in their order."""
GOOD, BAD, BLUE, GREY = "#2a7f62", "#b5483a", "#3b6ea5", "#666666"
LINES = {"cold": "#000", "warm": "#c47f00"}
WIDTH, TOP, HEIGHT, LEFT = 1180, 40, 420, 62
LABELS = 372
"""Px for the names of bars."""


def figures(rows: Sequence[Row], roof: Roof, models: Sequence[dict[str, Any]]) -> list[str]:
    """Of our best row of each cell."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    colours = {op: COLOURS[place % len(COLOURS)] for place, op in enumerate(ops)}
    found = [rooflines(rows, roof, colours)] if roof and any(row["bytes"] for row in rows) else []
    found += [theory(records)] if (records := slimmed(models)) else []
    for op in ops:
        mine = [row for row in rows if row["op"] == op and row["times_fastest_peer"]]
        found += [against_peers(op, mine)] if mine else []
    return found


def rooflines(rows: Sequence[Row], roof: Roof, colours: dict[str, str]) -> str:
    """Left what moves, under the bandwidths; right what multiplies, under the rates."""
    moving = [row for row in rows if row["bytes"] and row["ms"]]
    legend, height = _legend(colours, TOP + HEIGHT + 88)
    parts = [*_moving(moving, roof, colours), *_multiplying(moving, roof, colours), *legend]
    return svg.picture(WIDTH, height, parts, "roofline")


def _moving(rows: Sequence[Row], roof: Roof, colours: dict[str, str]) -> list[str]:
    curves = {
        (cache, kind): [(float(size), rate / 1e9) for size, rate in rates.items()]
        for cache in LINES
        for kind, rates in roof.get(cache, {}).items()
    }
    dots = [(row["bytes"], row["bytes"] / row["ms"] / 1e6, row) for row in rows]
    sizes = [dot[0] for dot in dots] + [size for curve in curves.values() for size, _ in curve]
    rates = [dot[1] for dot in dots] + [rate for curve in curves.values() for _, rate in curve]
    axes = svg.Axes(_around(sizes), _around(rates), LEFT, TOP, 490, HEIGHT)
    axes.frame("Bytes per second, by bytes moved", "bytes that the call must move", "GB/s")
    for place, ((cache, kind), curve) in enumerate(curves.items()):
        colour, dash = LINES[cache], "5 4" if kind == "read" else ""
        axes.line(curve, colour, dash, f"{kind}, {cache}")
        axes.under(125 * place, f"{kind}, {cache}", colour, dash)
    for x, y, row in dots:
        axes.dot(x, y, colours[row["op"]], _narrow(row), _title(row, f"{number(y)} GB/s"))
    return axes.parts


def _multiplying(rows: Sequence[Row], roof: Roof, colours: dict[str, str]) -> list[str]:
    dots = [
        (row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e6, row)
        for row in rows
        if row["flops"]
    ]
    if not dots:
        return []
    flat = {f"{dtype} product": rate / 1e9 for dtype, rate in roof["gemm"].items()}
    flat |= {"multiply-adds": roof["fma"] / 1e9} if "fma" in roof else {}
    highest = max(flat.values())
    x = _around([dot[0] for dot in dots] + [0.1, 1e3])
    axes = svg.Axes(x, _around([highest, *(y for _, y, _ in dots)]), 652, TOP, 390, HEIGHT)
    axes.frame(
        "Flop per second, by flop per byte", "flop per byte (arithmetic intensity)", "GFLOP/s"
    )
    for place, (cache, colour) in enumerate(LINES.items()):
        if rates := roof.get(cache, {}).get("copy"):
            size = max(rates, key=int) if cache == "cold" else max(rates, key=lambda s: rates[s])
            _slope(axes, rates[size] / 1e9, highest, colour)
            words = f"copy, {cache}: {number(rates[size] / 1e9)} GB/s"
            axes.under(190 * place, words, colour)
    for name, rate in flat.items():
        axes.line([(x[0], rate), (x[1], rate)], GREY, "", f"{name}: {number(rate)} GFLOP/s")
    axes.beside([(rate, f"{name}") for name, rate in flat.items()], GREY)
    for across, up, row in dots:
        said = _title(row, f"{number(across)} flop/byte, {number(up)} GFLOP/s")
        axes.dot(across, up, colours[row["op"]], _narrow(row), said)
    return axes.parts


def _slope(axes: svg.Axes, rate: float, highest: float, colour: str) -> None:
    """A bandwidth, from where it enters the frame to the highest roof."""
    start = max(axes.x[0], axes.y[0] / rate)
    end = min(axes.x[1], highest / rate)
    if start < end:
        axes.line([(start, rate * start), (end, rate * end)], colour)


def _legend(colours: dict[str, str], top: float) -> tuple[list[str], float]:
    """Colours are ops, shapes are dtypes."""
    parts, columns = [], 6
    entries = [(op, colour, False) for op, colour in colours.items()]
    entries += [("bfloat16, float16", "#888", True), ("float32", "#888", False)]
    for place, (words, colour, square) in enumerate(entries):
        x, y = LEFT + 185 * (place % columns), top + 19 * (place // columns)
        shape = {"x": x, "y": y - 9, "width": 9, "height": 9}
        dot = {"cx": x + 4.5, "cy": y - 4.5, "r": 5}
        parts.append(
            svg.tag("rect", fill=colour, **shape)
            if square
            else svg.tag("circle", fill=colour, **dot)
        )
        parts.append(svg.text(x + 15, y, words))
    return parts, top + 19 * -(-len(entries) // columns)


def against_peers(op: str, rows: Sequence[Row]) -> str:
    """A bar per case and dtype: times faster than the fastest peer, and share of the limit."""
    names = [f"{r['case']} {_brief(r['dtype'])}" + r["gradient"] * " +backward" for r in rows]
    ratios, shares = [], []
    for name, row in zip(names, rows, strict=True):
        ratio, share = row["times_fastest_peer"], row["roof_percent"] or 0.0
        said = _title(row, f"× {number(ratio)}")
        colour = GOOD if ratio >= 1 else BAD
        ratios.append(svg.Bar(name, ratio, f"× {number(ratio)}", colour, said))
        words = f"{number(share)} %" if share else "no limit known"
        shares.append(svg.Bar(name, share, words, BLUE, said))
    ours = svg.bars(
        ratios, LABELS, TOP, 480, "times faster than the fastest peer", log=True, line=1
    )
    roofs = svg.bars(shares, LABELS + 492, TOP, 316, "% of the measured limit", line=100)
    return _named(op, names, [*ours, *roofs], "peers")


def slimmed(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of what saves something in theory."""
    return [m for m in models if float(m.get("in theory") or 1) > 1 and m.get("faster")]


def theory(records: Sequence[dict[str, Any]]) -> str:
    """A bar per model, form and batch: times faster than the dense one; the mark is the theory."""
    names, found = [], []
    for record in records:
        batch = f"batch {record['batch']}" if "batch" in record else ""
        known = (
            record.get("model"),
            record.get("form"),
            record.get("build"),
            batch,
            record.get("dtype"),
        )
        names.append(" · ".join(str(part) for part in known if part))
        faster, could = float(record["faster"]), float(record["in theory"])
        words = f"× {number(faster)} of {number(could)}, {faster / could:.0%}"
        colour = GOOD if faster >= 0.95 * could else BLUE
        said = f"{names[-1]}: {words}" + (
            f", {number(record['ms'])} ms" if record.get("ms") else ""
        )
        found.append(svg.Bar(names[-1], faster, words, colour, said, could))
    across = (
        "times faster than the dense model; mark: what its arithmetic promises; green: 95 % of it"
    )
    parts = svg.bars(found, LABELS, TOP, WIDTH - LABELS - 60, across)
    return _named("Methods: what is saved, and what could be", names, parts, "theory")


def _named(title: str, names: Sequence[str], parts: list[str], kind: str) -> str:
    head = svg.text(0, 18, title, font_weight="bold", font_size=14)
    labels = [svg.text(LABELS - 8, TOP + 19 * n + 14, _cut(w), "end") for n, w in enumerate(names)]
    return svg.picture(WIDTH, TOP + 19 * len(names) + 24, [head, *labels, *parts], kind)


def _brief(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def _cut(words: str) -> str:
    return words if len(words) <= 50 else words[:49] + "…"


def _around(values: Sequence[float]) -> svg.Range:
    """A little more than they span."""
    return min(values) / 1.6, max(values) * 1.6


def _narrow(row: Row) -> bool:
    return re.search("16", row["dtype"]) is not None


def _title(row: Row, figures: str) -> str:
    words = f"{row['op']} · {row['case']} · {row['dtype']}" + row["gradient"] * " · +backward"
    share = f", {number(row['roof_percent'], 2)} % of the limit" if row["roof_percent"] else ""
    return f"{words}: {number(1e3 * row['ms'])} µs, {figures}{share}"
