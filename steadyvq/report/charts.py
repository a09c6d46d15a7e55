# SPDX-License-Identifier: Apache-2.0
"""Curves over steps as inline SVG, with marks where stages begin.

Every logged value is a point of its curve: nothing is resampled or smoothed. Colours and line styles are classes that
the page's style sheet defines for light and for dark; the numbers below are the SVG's own units, about a pixel each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from steadyvq.report.markup import Markup, tag
from steadyvq.report.runs import Point
from steadyvq.report.scales import Number, Scale, tick_label, value_label, value_scale
from steadyvq.report.style import STANDALONE

WIDTH, HEIGHT = 400, 234
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 18, 32
LABEL_HEIGHT = 13
LETTER = 7.4  # mean width of a letter in axis labels, at the size that phones show
MARK_ROWS = 4
# Values of curves with few points can be pointed at; more dots than this would hide the line.
DOTS_UP_TO = 60
COLOURS = 6
LEGEND_HEIGHT = 16


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: its name in the legend.
        points: steps and values; None breaks the line.
        colour: position in the palette, or None for grey.
        dashed: whether it is a reference and not a measurement.
        band: lower and upper bounds at some steps (step, low, high).
    """

    label: str
    points: list[Point]
    colour: int | None
    dashed: bool = False
    band: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        """The finite values."""
        return [value for _, value in self.points if value is not None]


@dataclass(frozen=True)
class Mark:
    """A labelled vertical line where a stage begins; colour None means that it concerns all curves."""

    step: float
    label: str
    colour: int | None = None


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes.

    Attributes:
        title: what is shown.
        series: the curves.
        last_step: where the axis of steps ends, the same in all charts of a page.
        marks: where stages begin.
        unit: of the vertical axis.
        limits: range that the vertical axis shows at least; None lets the values choose.
        percent: whether values are shares, shown in percent.
        caption: one sentence on what the numbers mean, or empty.
        legend: whether even a single curve is named.
    """

    title: str
    series: Sequence[Series]
    last_step: int
    marks: Sequence[Mark] = ()
    unit: str = ""
    limits: tuple[float, float] | None = None
    percent: bool = False
    caption: str = ""
    legend: bool = False


def style(colour: int | None) -> str:
    """Return the classes of a colour (None: grey): beyond the palette, the colours come again with other dashes."""
    if colour is None:
        return "neutral"
    return f"c{colour % COLOURS} l{min(colour // COLOURS, 2)}"


def chart_figure(chart: Chart) -> Markup:
    """Return a figure with title, legend, curves and caption."""
    shown = [series for series in chart.series if series.values]
    only = shown[0] if len(shown) == 1 and not chart.legend else None
    last = tag("span", value_label(only.values[-1], chart.percent), class_="last") if only else None
    return tag(
        "figure",
        tag("figcaption", tag("span", chart.title, class_="name"), last),
        None if only else _legend(shown, chart.percent),
        _svg(chart, shown),
        tag("p", chart.caption, class_="caption") if chart.caption else None,
        class_="chart",
    )


def svg_file(chart: Chart) -> str:
    """Return a chart as an SVG document of its own, with its legend below and its colours inside."""
    shown = [series for series in chart.series if series.values]
    height = HEIGHT + LEGEND_HEIGHT * len(shown) + 26
    rows = []
    for row, series in enumerate(shown):
        y = HEIGHT + 34 + LEGEND_HEIGHT * row
        line = tag("line", x1=LEFT, x2=LEFT + 20, y1=y - 4, y2=y - 4, class_="key")
        name = tag("text", f"{series.label}  {value_label(series.values[-1], chart.percent)}", x=LEFT + 28, y=y)
        rows.append(tag("g", line, name, class_=style(series.colour)))
    return tag(
        "svg",
        tag("style", Markup(STANDALONE)),
        tag("rect", width="100%", height="100%", fill="#fff"),
        tag("text", chart.title, x=4, y=14, class_="name"),
        tag("svg", *_drawing(chart, shown), y=20, width=WIDTH, height=HEIGHT, viewBox=f"0 0 {WIDTH} {HEIGHT}"),
        *rows,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        width=WIDTH,
        height=height,
    )


def _legend(series: Iterable[Series], percent: bool) -> Markup:
    items = []
    for one in series:
        line = tag("line", x1=1, y1=5, x2=19, y2=5, class_="dashed" if one.dashed else None)
        swatch = tag("svg", line, viewBox="0 0 20 10", class_=f"swatch {style(one.colour)}", aria_hidden="true")
        last = tag("span", value_label(one.values[-1], percent), class_="last")
        items.append(tag("li", swatch, tag("span", one.label), last))
    return tag("ul", *items, class_="legend")


def _svg(chart: Chart, shown: Sequence[Series]) -> Markup:
    return tag("svg", *_drawing(chart, shown), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")


def _drawing(chart: Chart, shown: Sequence[Series]) -> list[Markup]:
    values = [value for series in shown for value in series.values]
    values += [bound for series in shown for _, *bounds in series.band for bound in bounds]
    x = Scale(0, max(1, chart.last_step), LEFT, WIDTH - RIGHT)
    labels, rows = _marks(chart.marks, x)
    y = value_scale(values, HEIGHT - BOTTOM, TOP + LABEL_HEIGHT * rows + 6, chart.limits)
    unit = f"{chart.unit} (log scale)".strip() if y.log else chart.unit
    names = ", ".join(series.label for series in shown)
    return [
        tag("title", f"{chart.title} over training steps: {names}"),
        axes(x, y, "step", unit, chart.percent),
        *labels,
        *(_band(series, x, y) for series in shown if series.band),
        *(_curve(series, x, y, chart.percent) for series in shown),
    ]


def axes(x: Scale, y: Scale, x_name: str, y_name: str, percent: bool = False) -> Markup:
    """Return both axes with their ticks and names."""
    left, right, bottom = x.start, x.end, y.start
    parts = []
    end_label = f"{x_name} {x.high:,.0f}"
    for tick in y.ticks(4):
        at = place(y(tick))
        parts.append(tag("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", tick_label(tick, percent), x=left - 6, y=at, dy="0.35em", class_="end"))
    for tick in x.ticks(4):
        at = place(x(tick))
        parts.append(tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
        # A label near the end of the axis would run into the axis's name.
        if x(tick) < right - LETTER * (len(end_label) + len(tick_label(tick)) / 2 + 1.5):
            parts.append(tag("text", tick_label(tick), x=at, y=bottom + 16, class_="middle"))
    parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(tag("text", end_label, x=right, y=bottom + 16, class_="end"))
    if y_name:
        parts.append(tag("text", y_name, x=4, y=11))
    return tag("g", *parts, class_="axes")


def _marks(marks: Sequence[Mark], x: Scale) -> tuple[list[Markup], int]:
    """Place the labels in as few rows as they need without touching; what finds no row keeps its line."""
    ends: list[float] = []
    parts = []
    for mark in sorted(marks, key=lambda mark: mark.step):
        at, length = x(mark.step), LETTER * len(mark.label) + 8
        start = at if at + length <= x.end else at - length
        row = next((i for i, end in enumerate(ends) if end <= start), len(ends))
        if row == len(ends) and row < MARK_ROWS:
            ends.append(0.0)
        top = TOP + LABEL_HEIGHT * min(row, MARK_ROWS)
        line = tag("line", x1=place(at), x2=place(at), y1=top, y2=HEIGHT - BOTTOM)
        label = None
        if row < MARK_ROWS:
            ends[row] = start + length
            side = "start" if start == at else "end"
            label = tag("text", mark.label, x=place(at + 4 if side == "start" else at - 4), y=top + 9, class_=side)
        hover = tag("title", f"{mark.label}: from step {mark.step:,.0f}")
        parts.append(tag("g", hover, line, label, class_=f"mark {style(mark.colour)}"))
    return parts, len(ends)


def _curve(series: Series, x: Scale, y: Scale, percent: bool) -> Markup:
    parts = []
    dots = len(series.values) <= DOTS_UP_TO
    for missing, group in groupby(series.points, key=lambda point: point[1] is None):
        segment = [(step, value) for step, value in group if value is not None]
        if missing:
            continue
        line = " ".join(f"{place(x(step))},{place(y(value))}" for step, value in segment)
        parts.append(tag("polyline", points=line, class_="dashed" if series.dashed else None))
        if not series.dashed and (dots or len(segment) == 1):
            radius = 3.5 if len(series.values) == 1 else 2
            parts += [_dot(series.label, step, value, x, y, percent, radius) for step, value in segment]
    return tag("g", *parts, class_=f"curve {style(series.colour)}", data_label=series.label)


def _dot(label: str, step: float, value: float, x: Scale, y: Scale, percent: bool, radius: Number) -> Markup:
    hover = tag("title", f"{label}, step {step:,.0f}: {value_label(value, percent)}")
    return tag("circle", hover, cx=place(x(step)), cy=place(y(value)), r=radius)


def _band(series: Series, x: Scale, y: Scale) -> Markup:
    upper = [f"{place(x(step))},{place(y(high))}" for step, _, high in series.band]
    lower = [f"{place(x(step))},{place(y(low))}" for step, low, _ in reversed(series.band)]
    return tag("polygon", points=" ".join(upper + lower), class_=f"band {style(series.colour)}")


def place(value: Number) -> str:
    """Return a position as text, to a hundredth of a unit."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
