# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: curves over steps with stage marks, and the histogram of code usage.

Every logged value is a point of its curve: nothing is resampled or smoothed. Colours and line styles are classes that
the page's style sheet defines for light and for dark; the numbers below are the SVG's own units, about a pixel each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from steadyvq.report.markup import Markup, tag
from steadyvq.report.runs import Point
from steadyvq.report.scales import Number, Scale, tick_label, value_label, value_scale

WIDTH, HEIGHT = 400, 234
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 18, 32
LABEL_HEIGHT = 13
LETTER = 6.2  # mean width of a letter in axis labels
MARK_ROWS = 4
# Values of curves with few points can be pointed at; more dots than this would hide the line.
DOTS_UP_TO = 60
COLOURS = 6


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


def _legend(series: Iterable[Series], percent: bool) -> Markup:
    items = []
    for one in series:
        line = tag("line", x1=1, y1=5, x2=19, y2=5, class_="dashed" if one.dashed else None)
        swatch = tag("svg", line, viewBox="0 0 20 10", class_=f"swatch {style(one.colour)}", aria_hidden="true")
        last = tag("span", value_label(one.values[-1], percent), class_="last")
        items.append(tag("li", swatch, tag("span", one.label), last))
    return tag("ul", *items, class_="legend")


def _svg(chart: Chart, shown: Sequence[Series]) -> Markup:
    values = [value for series in shown for value in series.values]
    values += [bound for series in shown for _, *bounds in series.band for bound in bounds]
    x = Scale(0, max(1, chart.last_step), LEFT, WIDTH - RIGHT)
    labels, rows = _marks(chart.marks, x)
    y = value_scale(values, HEIGHT - BOTTOM, TOP + LABEL_HEIGHT * rows + 6, chart.limits)
    unit = f"{chart.unit} (log scale)".strip() if y.log else chart.unit
    names = ", ".join(series.label for series in shown)
    return tag(
        "svg",
        tag("title", f"{chart.title} over training steps: {names}"),
        _axes(x, y, "step", unit, chart.percent),
        *labels,
        *(_band(series, x, y) for series in shown if series.band),
        *(_curve(series, x, y, chart.percent) for series in shown),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )


def _axes(x: Scale, y: Scale, x_name: str, y_name: str, percent: bool = False) -> Markup:
    left, right, bottom = x.start, x.end, y.start
    parts = []
    end_label = f"{x_name} {tick_label(x.high)}"
    for tick in y.ticks(4):
        at = _n(y(tick))
        parts.append(tag("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", tick_label(tick, percent), x=left - 6, y=at, dy="0.35em", class_="end"))
    for tick in x.ticks(4):
        at = _n(x(tick))
        parts.append(tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
        # A label near the end of the axis would run into the axis's name.
        if x(tick) < right - LETTER * (len(end_label) + len(tick_label(tick)) / 2 + 1):
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
        line = tag("line", x1=_n(at), x2=_n(at), y1=top, y2=HEIGHT - BOTTOM)
        label = None
        if row < MARK_ROWS:
            ends[row] = start + length
            side = "start" if start == at else "end"
            label = tag("text", mark.label, x=_n(at + 4 if side == "start" else at - 4), y=top + 9, class_=side)
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
        line = " ".join(f"{_n(x(step))},{_n(y(value))}" for step, value in segment)
        parts.append(tag("polyline", points=line, class_="dashed" if series.dashed else None))
        if not series.dashed and (dots or len(segment) == 1):
            radius = 3.5 if len(series.values) == 1 else 2
            parts += [_dot(series.label, step, value, x, y, percent, radius) for step, value in segment]
    return tag("g", *parts, class_=f"curve {style(series.colour)}", data_label=series.label)


def _dot(label: str, step: float, value: float, x: Scale, y: Scale, percent: bool, radius: Number) -> Markup:
    hover = tag("title", f"{label}, step {step:,.0f}: {value_label(value, percent)}")
    return tag("circle", hover, cx=_n(x(step)), cy=_n(y(value)), r=radius)


def _band(series: Series, x: Scale, y: Scale) -> Markup:
    upper = [f"{_n(x(step))},{_n(y(high))}" for step, _, high in series.band]
    lower = [f"{_n(x(step))},{_n(y(low))}" for step, low, _ in reversed(series.band)]
    return tag("polygon", points=" ".join(upper + lower), class_=f"band {style(series.colour)}")


def _n(value: Number) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def usage_figure(label: str, counts: Sequence[int], colour: int, highest: int) -> Markup:
    """Return the histogram of code usage: codes from most to least hit, dead codes shaded and counted.

    Args:
        label: name of the run.
        counts: hits per code on the held-out images.
        colour: position in the palette.
        highest: the count at which the axis ends, so that runs can be compared by eye.
    """
    ordered = sorted(counts, reverse=True)
    active = sum(count > 0 for count in ordered)
    dead = len(ordered) - active
    summary = f"{active:,} of {len(ordered):,} used, {dead:,} dead"
    x = Scale(0, len(ordered), LEFT, WIDTH - RIGHT)
    # Half a hit is below the bar of a code hit once, which must have a height on a logarithmic axis.
    y = Scale(0.5, max(2, highest) * 1.3, HEIGHT - BOTTOM, TOP + 6, log=True)
    dead_codes = _dead_codes(active, dead, x, y) if dead else None
    uniform = _uniform_line(sum(ordered) / len(ordered), x, y)
    parts = [dead_codes, _axes(x, y, "code", "hits (log scale)"), _staircase(ordered, active, x, y, colour), uniform]
    title = tag("title", f"Code usage of {label}, most used code first: {summary}")
    picture = tag("svg", title, *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")
    head = tag("figcaption", tag("span", label, class_="name"), tag("span", summary, class_="last"))
    return tag("figure", head, picture, class_="chart usage")


def _staircase(ordered: Sequence[int], active: int, x: Scale, y: Scale, colour: int) -> Markup:
    """Draw one step per distinct count, which is exact: codes with equal counts stand side by side."""
    corners, first = [f"{_n(x(0))},{_n(y.start)}"], 0
    for count, group in groupby(ordered[:active]):
        last = first + sum(1 for _ in group)
        corners += [f"{_n(x(first))},{_n(y(count))}", f"{_n(x(last))},{_n(y(count))}"]
        first = last
    corners.append(f"{_n(x(active))},{_n(y.start)}")
    return tag("polygon", points=" ".join(corners), class_=f"bars {style(colour)}")


def _uniform_line(mean: float, x: Scale, y: Scale) -> Markup | None:
    if mean <= y.low:
        return None
    at = y(mean)
    line = tag("line", x1=x.start, x2=x.end, y1=_n(at), y2=_n(at), class_="dashed")
    return tag(
        "g", line, tag("text", "if all were used alike", x=x.end - 4, y=_n(at - 5), class_="end"), class_="neutral"
    )


def _dead_codes(active: int, dead: int, x: Scale, y: Scale) -> Markup:
    left, width, bottom = x(active), x.end - x(active), y.start
    shade = tag("rect", x=_n(left), width=_n(width), y=_n(y.end), height=_n(bottom - y.end), class_="shade")
    text = f"{dead:,} dead"
    # Where the label has no room the figure's heading tells the count.
    fits = width > 7 * len(text) + 8
    label = tag("text", text, x=_n(left + width / 2), y=_n(bottom - 12), class_="middle") if fits else None
    return tag("g", shade, label, class_="dead")
