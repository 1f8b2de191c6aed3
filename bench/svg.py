"""Axes, dots, lines and bars as inline SVG: no library, no script, nothing from the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

Range = tuple[float, float]
Point = tuple[float, float]
LABEL = 13.0
"""Height of a line of text, in px."""


def tag(name: str, title: object = "", content: object = "", **attributes: object) -> str:
    """`title` is shown where the mouse rests; `_` in the name of an attribute stands for `-`."""
    words = " ".join(
        f'{key.rstrip("_").replace("_", "-")}="{_text(v)}"' for key, v in attributes.items()
    )
    inside = (f"<title>{escape(str(title))}</title>" if title else "") + str(content)
    return f"<{name} {words}>{inside}</{name}>" if inside else f"<{name} {words}/>"


def text(x: float, y: float, words: str, anchor: str = "start", **attributes: object) -> str:
    return tag("text", content=escape(words), x=x, y=y, text_anchor=anchor, **attributes)


def picture(width: float, height: float, parts: Iterable[str], name: str) -> str:
    """One figure; `name` tells readers of the page, and tests, which."""
    box = f"0 0 {width:.0f} {height:.0f}"
    return (
        f'<svg class="{name}" xmlns="http://www.w3.org/2000/svg" viewBox="{box}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{name}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


@dataclass
class Axes:
    """Two logarithmic scales in a frame whose left upper corner is (left, top)."""

    x: Range
    y: Range
    left: float
    top: float
    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def place(self, x: float, y: float) -> Point:
        """In px; what lies outside comes to lie on the frame."""
        across, up = (
            (math.log(min(max(value, low), high)) - math.log(low)) / math.log(high / low)
            for value, (low, high) in ((x, self.x), (y, self.y))
        )
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def frame(self, title: str, across: str, up: str) -> None:
        """The frame, its scales and what they mean."""
        bottom, right = self.top + self.height, self.left + self.width
        for value in decades(self.x):
            px, _ = self.place(value, self.y[0])
            self.parts.append(tag("path", d=f"M{px:.1f} {self.top}V{bottom}", stroke="#e4e4e4"))
            self.parts.append(text(px, bottom + 15, short(value), "middle"))
        for value in decades(self.y):
            _, py = self.place(self.x[0], value)
            self.parts.append(tag("path", d=f"M{self.left} {py:.1f}H{right}", stroke="#e4e4e4"))
            self.parts.append(text(self.left - 5, py + 4, short(value), "end"))
        middle, side = self.top + self.height / 2, self.left - 46
        self.parts += [
            tag("rect", x=self.left, y=self.top, width=self.width, height=self.height,
                fill="none", stroke="#888"),
            text(self.left, self.top - 10, title, font_weight="bold", font_size=14),
            text(self.left + self.width / 2, bottom + 34, across, "middle"),
            text(side, middle, up, "middle", transform=f"rotate(-90 {side:.0f} {middle:.0f})"),
        ]  # fmt: skip

    def line(self, points: Sequence[Point], colour: str, dash: str = "", title: str = "") -> None:
        places = " ".join("{:.1f},{:.1f}".format(*self.place(*point)) for point in points)
        self.parts.append(
            tag("polyline", title, points=places, fill="none", stroke=colour, stroke_width=1.6,
                stroke_dasharray=dash or "none")
        )  # fmt: skip

    def dot(self, x: float, y: float, colour: str, square: bool, title: str) -> None:
        px, py = self.place(x, y)
        look: dict[str, object] = {"fill": colour, "fill_opacity": 0.75, "stroke": "white"}
        if square:
            self.parts.append(
                tag("rect", title, x=px - 4, y=py - 4, width=8, height=8, **look, class_="dot")
            )
        else:
            self.parts.append(tag("circle", title, cx=px, cy=py, r=4.6, **look, class_="dot"))

    def under(self, offset: float, words: str, colour: str, dash: str = "") -> None:
        """What the line of this colour is, under the scale."""
        x, y = self.left + offset, self.top + self.height + 56
        self.parts += [
            tag("path", d=f"M{x} {y - 4}h26", stroke=colour, stroke_width=1.6,
                stroke_dasharray=dash or "none"),
            text(x + 31, y, words),
        ]  # fmt: skip

    def beside(self, labels: Iterable[tuple[float, str]], colour: str) -> None:
        """Words right of the frame, near their values, none over another."""
        last = -math.inf
        for value, words in sorted(labels, reverse=True):
            _, py = self.place(self.x[0], value)
            last = max(py, last + LABEL)
            self.parts.append(text(self.left + self.width + 6, last + 4, words, fill=colour))


@dataclass
class Bar:
    """A line of a bar chart; `mark` is where it could be."""

    label: str
    value: float
    words: str
    colour: str
    title: str = ""
    mark: float | None = None


def bars(
    found: Sequence[Bar], left: float, top: float, width: float, across: str, *,
    step: float = 19.0, log: bool = False, line: float | None = None,
) -> list[str]:  # fmt: skip
    """Bars from `left` on, one under the other, with a line where their values are equal to it;
    room for their words is kept on the right.
    """
    values = [b.value for b in found] + [b.mark for b in found if b.mark] + [line or 0.0]
    high = max(values)
    low = min([value for value in values if value > 0], default=1.0)
    if log:
        low, high = min(low * 0.8, 0.5), max(high, 2.0)

    def place(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low) if log else value / high
        return left + share * (width - 90)

    bottom = top + step * len(found)
    parts = []
    for number, bar in enumerate(found):
        y = top + step * number
        end = place(bar.value)
        start = place(line) if log and line else left
        if bar.value:
            parts.append(
                tag("rect", bar.title, x=min(start, end), y=y + 3, width=max(abs(end - start), 1),
                    height=step - 6, fill=bar.colour, class_="bar")
            )  # fmt: skip
        if bar.mark:
            at = place(bar.mark)
            parts.append(
                tag("path", d=f"M{at:.1f} {y + 1}v{step - 2}", stroke="#222", stroke_width=2)
            )
        parts.append(text(max(end, start, place(bar.mark or 0)) + 5, y + step - 5, bar.words))
    if line:
        parts.append(tag("path", d=f"M{place(line):.1f} {top}V{bottom}", stroke="#222"))
    return [*parts, text(left, bottom + 15, across, fill="#555")]


def decades(scale: Range) -> list[float]:
    """Powers of ten inside; with twice and five times of them where there are few."""
    low, high = math.floor(math.log10(scale[0])), math.ceil(math.log10(scale[1]))
    factors = (1, 2, 5) if high - low <= 2 else (1,)
    found = [factor * 10.0**power for power in range(low, high + 1) for factor in factors]
    return [value for value in found if scale[0] <= value * 1.0001 and value <= scale[1] * 1.0001]


def short(value: float) -> str:
    """1k for a thousand."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _text(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else escape(str(value))
