# SPDX-License-Identifier: Apache-2.0
"""Differences with their intervals as dots on lines, in panels side by side: who is ahead of whom, and how surely."""

from collections.abc import Sequence
from dataclasses import dataclass

from steadyvq.report.charts import LEGEND_HEIGHT, LETTER, place, style
from steadyvq.report.markup import Markup, tag
from steadyvq.report.scales import Number, Scale, tick_label
from steadyvq.report.style import STANDALONE

PANEL, GAP, ROW, TOP = 190, 16, 26, 40


@dataclass(frozen=True)
class Dot:
    """A difference.

    Attributes:
        panel: In which panel it is drawn.
        row: In which row.
        series: Whose colour it has.
        value: The difference.
        low: Lower end of its interval.
        high: Upper end.
    """

    panel: str
    row: str
    series: str
    value: float
    low: float
    high: float


def intervals_svg(title: str, unit: str, dots: Sequence[Dot]) -> str:
    """An SVG document with a panel per name, a row per name, and a dot with its interval for every difference.

    All panels share one scale, which holds 0.

    Args:
        title: What is shown.
        unit: Of the differences, and what a positive one means.
        dots: In the order of panels, rows and series; at least one.
    """
    panels, rows, series = (
        list(dict.fromkeys(found)) for found in zip(*((d.panel, d.row, d.series) for d in dots), strict=True)
    )
    left = 12 + LETTER * max(map(len, rows))
    width = left + len(panels) * (PANEL + GAP)
    bottom = TOP + ROW * len(rows)
    low, high = min(0.0, *(dot.low for dot in dots)), max(0.0, *(dot.high for dot in dots))
    margin = 0.05 * (high - low) or 1.0
    scales = {
        panel: Scale(low - margin, high + margin, left + i * (PANEL + GAP), left + i * (PANEL + GAP) + PANEL)
        for i, panel in enumerate(panels)
    }
    middle = {row: TOP + ROW * (i + 0.5) for i, row in enumerate(rows)}
    names = [tag("text", row, x=place(left - 10), y=place(middle[row]), dy="0.35em", class_="end") for row in rows]
    keys = []
    for i, one in enumerate(series):
        y = bottom + 40 + LEGEND_HEIGHT * i
        keys.append(tag("g", tag("circle", cx=left + 4, cy=y - 4, r=4), class_=f"curve {style(i)}"))
        keys.append(tag("text", one, x=place(left + 16), y=y))
    height = bottom + 34 + LEGEND_HEIGHT * len(series)
    return tag(
        "svg",
        tag("style", Markup(STANDALONE)),
        tag("rect", width="100%", height="100%", fill="#fff"),
        tag("text", title, x=4, y=14, class_="name"),
        *(_panel(name, scale, bottom, unit) for name, scale in scales.items()),
        *names,
        *(_dot(dot, scales[dot.panel], middle[dot.row], series.index(dot.series), len(series)) for dot in dots),
        *keys,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {place(width)} {height}",
        width=place(width),
        height=height,
    )


def _panel(name: str, scale: Scale, bottom: Number, unit: str) -> Markup:
    parts = [tag("text", name, x=place((scale.start + scale.end) / 2), y=TOP - 8, class_="middle name")]
    for tick in scale.ticks(4):
        at = place(scale(tick))
        parts.append(tag("line", x1=at, x2=at, y1=TOP, y2=bottom, class_="axis" if tick == 0 else "grid"))
        parts.append(tag("text", tick_label(tick), x=at, y=bottom + 12, class_="middle"))
    parts.append(tag("text", unit, x=place((scale.start + scale.end) / 2), y=bottom + 26, class_="middle"))
    return tag("g", *parts)


def _dot(dot: Dot, x: Scale, y: Number, colour: int, count: int) -> Markup:
    y += 7 * (colour - (count - 1) / 2)
    hover = tag("title", f"{dot.row}, {dot.panel}, {dot.series}: {dot.value:+.3g} [{dot.low:+.3g}, {dot.high:+.3g}]")
    line = tag("polyline", points=f"{place(x(dot.low))},{place(y)} {place(x(dot.high))},{place(y)}")
    circle = tag("circle", cx=place(x(dot.value)), cy=place(y), r=3.2)
    return tag("g", hover, line, circle, class_=f"curve {style(colour)}")
