# SPDX-License-Identifier: Apache-2.0
"""How a codebook is used, as inline SVG: codes by number of hits, codes in order of hits, codes by time since a hit.

A figure holds one element per bin or per distinct count, never one per code, so 65,536 codes make no larger a page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import NormalDist

import numpy as np

from steadyvq.report.charts import BOTTOM, HEIGHT, LABEL_HEIGHT, LEFT, LETTER, RIGHT, TOP, WIDTH, axes, place, style
from steadyvq.report.markup import Markup, tag
from steadyvq.report.scales import Number, Scale, tick_label, value_label

NEVER_WIDTH, NEVER_GAP = 34, 18
# Above this mean the normal distribution is as good as the sum over all counts, and much quicker.
NORMAL_FROM = 10_000
MOST_BINS = 40
NARROWEST = 0.05


@dataclass(frozen=True)
class Bin:
    """Codes whose value lies in [low, high).

    Attributes:
        low: lower edge.
        high: upper edge.
        codes: how many codes.
        share: the same as a share of all codes.
        expected: the share that chance would put here if all codes were used alike, or None.
    """

    low: float
    high: float
    codes: int
    share: float
    expected: float | None


def hit_bins(counts: Sequence[int], highest: Number) -> list[Bin]:
    """Return codes by number of hits: never hit, once, 2 to 3, 4 to 7 and so on, up to the bin of `highest`."""
    edges = _edges(highest)
    return _bins(counts, edges, _uniform_hits(edges, sum(counts), len(counts)))


def idle_bins(idle: Sequence[Number], highest: Number) -> list[Bin]:
    """Return codes by missed hits: less than 1, from 1 to 2, from 2 to 4 and so on, up to the bin of `highest`.

    The time between the hits of a code that is drawn with probability 1/K is exponential with mean 1 in this unit.
    """
    edges = _edges(highest)
    return _bins(idle, edges, [math.exp(-low) - math.exp(-high) for low, high in pairwise(edges)])


def share_limit(binned: Sequence[Sequence[Bin]]) -> float:
    """Return the share at which an axis for all of these ends."""
    return max((max(one.share, one.expected or 0.0) for bins in binned for one in bins), default=1.0)


def hits_figure(name: str, caption: str, bins: Sequence[Bin], colour: int, highest: Number) -> Markup:
    """Return the histogram of hits, with the codes that were never hit apart.

    Args:
        name: shown above the figure.
        caption: shown below, or empty.
        bins: as from `hit_bins`.
        colour: position in the palette.
        highest: share at which the vertical axis ends, so that runs can be compared by eye.
    """
    never, *hit = bins
    x = _Columns(LEFT + NEVER_WIDTH + NEVER_GAP, len(hit))
    y = _share_scale(highest)
    dead = (
        _bar(never, LEFT + 2, LEFT + NEVER_WIDTH - 2, y, "never hit", "dead"),
        tag("text", "never", x=LEFT + NEVER_WIDTH / 2, y=HEIGHT - BOTTOM + 16, class_="middle"),
    )
    bars = [_bar(one, x(i) + 1, x(i + 1) - 1, y, _hits_label(one), style(colour)) for i, one in enumerate(hit)]
    parts = [_share_axis(y), tag("g", *dead), *bars, _edge_labels([one.low for one in hit], x, "hits")]
    return _figure(name, caption, f"{never.codes:,} never hit", "Codes by number of hits", parts)


def idle_figure(
    name: str,
    caption: str,
    idle: Sequence[Number],
    bins: Sequence[Bin],
    colour: int,
    highest: Number,
    patience: Number | None,
) -> Markup:
    """Return the histogram of missed hits, with the patience as a mark.

    Args:
        name: shown above the figure.
        caption: shown below, or empty.
        idle: missed hits per code.
        bins: as from `idle_bins`.
        colour: position in the palette.
        highest: share at which the vertical axis ends.
        patience: missed hits after which a code is replaced, or None.
    """
    x, y = _Columns(LEFT, len(bins)), _share_scale(highest)
    bars = [_bar(one, x(i) + 1, x(i + 1) - 1, y, _idle_label(one), style(colour)) for i, one in enumerate(bins)]
    mark = None if patience is None else _patience_mark(patience, x)
    parts = [_share_axis(y), *bars, _edge_labels([one.low for one in bins], x, "missed"), mark]
    dead = 0 if patience is None else sum(missed > patience for missed in idle)
    summary = "" if patience is None else f"{dead:,} beyond patience {tick_label(patience)}"
    return _figure(name, caption, summary, "Codes by hits missed since the last one", parts)


def ranks_figure(name: str, caption: str, counts: Sequence[int], colour: int, highest: int) -> Markup:
    """Return the codes from most to least hit, dead codes shaded and counted.

    Args:
        name: shown above the figure.
        caption: shown below, or empty.
        counts: hits per code on the held-out images.
        colour: position in the palette.
        highest: the count at which the axis ends, so that runs can be compared by eye.
    """
    ordered = sorted(counts, reverse=True)
    active = sum(count > 0 for count in ordered)
    dead = len(ordered) - active
    x = Scale(0, len(ordered), LEFT, WIDTH - RIGHT)
    # Half a hit is below the bar of a code hit once, which must have a height on a logarithmic axis.
    y = Scale(0.5, max(2, highest) * 1.3, HEIGHT - BOTTOM, TOP + 6, log=True)
    dead_codes = _dead_codes(active, dead, x, y) if dead else None
    uniform = _uniform_line(sum(ordered) / len(ordered), x, y)
    parts = [dead_codes, axes(x, y, "code", "hits (log scale)"), _staircase(ordered, active, x, y, colour), uniform]
    summary = f"{active:,} used, {dead:,} dead"
    return _figure(name, caption, summary, "Code usage, most used code first", parts)


def _edges(highest: Number) -> list[float]:
    """Return 0, 1, 2, 4 and so on, until `highest` is below the last; beyond 2^40 the last bin takes everything."""
    powers = min(MOST_BINS, math.floor(math.log2(highest)) + 1 if highest >= 1 else 0)
    return [0.0, *(2.0**power for power in range(max(1, powers) + 1))]


def _bins(values: Sequence[Number], edges: Sequence[float], expected: Sequence[float] | None) -> list[Bin]:
    last = len(edges) - 2
    at = np.minimum(np.searchsorted(edges, np.asarray(values, np.float64), side="right") - 1, last)
    codes = np.bincount(at, minlength=last + 1).tolist()
    return [
        Bin(edges[i], edges[i + 1], codes[i], codes[i] / len(values), None if expected is None else expected[i])
        for i in range(last + 1)
    ]


def _uniform_hits(edges: Sequence[float], draws: int, num_codes: int) -> list[float] | None:
    """Return the shares of Binomial(draws, 1/K) between the edges, None where nothing could be drawn otherwise."""
    if num_codes < 2 or draws < 1:
        return None
    mean, p = draws / num_codes, 1 / num_codes
    if mean > NORMAL_FROM:
        normal = NormalDist(mean, math.sqrt(mean * (1 - p)))
        below = [normal.cdf(edge - 0.5) for edge in edges]
    else:
        # The tail beyond 12 standard deviations is below what a picture, or a double, can hold.
        counts = range(min(draws, math.ceil(mean + 12 * math.sqrt(mean) + 30)) + 1)
        start = math.lgamma(draws + 1) + draws * math.log1p(-p)
        odds = math.log(p) - math.log1p(-p)
        chances = (math.exp(start - math.lgamma(c + 1) - math.lgamma(draws - c + 1) + c * odds) for c in counts)
        sums = np.cumsum([0.0, *chances])
        below = [float(sums[min(int(edge), len(sums) - 1)]) for edge in edges]
    return [high - low for low, high in pairwise(below)]


class _Columns:
    """Positions of equally wide bins between `left` and the right end of a figure."""

    def __init__(self, left: Number, count: int) -> None:
        self.left, self.width = left, (WIDTH - RIGHT - left) / count

    def __call__(self, index: Number) -> float:
        return self.left + self.width * index


def _share_scale(highest: Number) -> Scale:
    return Scale(0.0, highest, HEIGHT - BOTTOM, TOP + 2 * LABEL_HEIGHT)


def _share_axis(y: Scale) -> Markup:
    parts = []
    for tick in y.ticks(4):
        at = place(y(tick))
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", tick_label(tick, percent=True), x=LEFT - 6, y=at, dy="0.35em", class_="end"))
    parts.append(tag("text", "share of all codes", x=4, y=11))
    return tag("g", *parts, class_="axes")


def _bar(one: Bin, left: Number, right: Number, y: Scale, label: str, look: str) -> Markup:
    """Draw a bin with its number of codes above, and a line where chance would end it."""
    if one.codes == 0 and not one.expected:
        return tag("g")
    # A single code of 65,536 must still be seen.
    top = min(y(one.share), y.start - 1.5) if one.codes else y.start
    chance = "" if one.expected is None else f", by chance {value_label(one.expected, percent=True)}"
    hover = tag("title", f"{label}: {one.codes:,} codes, {value_label(one.share, percent=True)}{chance}")
    bar = tag("rect", x=place(left), width=place(right - left), y=place(top), height=place(y.start - top))
    line, label_at = None, top - 4
    if one.expected is not None and y.start - y(one.expected) >= 0.5:
        at = y(one.expected)
        line = tag("line", x1=place(left - 1), x2=place(right + 1), y1=place(at), y2=place(at), class_="chance")
        label_at = at - 4 if top - LABEL_HEIGHT - 2 < at < top else label_at
    text = _count((left + right) / 2, label_at, one.codes, right - left) if one.codes else None
    return tag("g", hover, bar, line, text, class_=f"bin {look}")


def _count(x: Number, y: Number, count: int, room: Number) -> Markup:
    """Write a number above a bar, upwards where the bar is narrower than the number."""
    if room >= LETTER * 4 - 6:
        return tag("text", _brief(count), x=place(x), y=place(y), class_="middle count")
    x, y = x + LETTER / 2, y + 1
    turn = f"rotate(-90 {place(x)} {place(y)})"
    return tag("text", _brief(count), x=place(x), y=place(y), transform=turn, class_="count")


def _brief(count: int) -> str:
    """Return a count in at most four characters."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}" if count < 10 * size else f"{count // size}{letter}"
    return str(count)


def _edge_labels(edges: Sequence[float], x: _Columns, name: str) -> Markup:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    texts = [tick_label(edge) for edge in edges]
    stride = math.ceil((LETTER * max(len(text) for text in texts) + 6) / x.width)
    parts = [tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis")]
    for i, text in enumerate(texts):
        parts.append(tag("line", x1=place(x(i)), x2=place(x(i)), y1=bottom, y2=bottom + 4, class_="axis"))
        if i % stride == 0 and x(i) < right - LETTER * (len(name) + len(text) / 2 + 1.5):
            parts.append(tag("text", text, x=place(x(i)), y=bottom + 16, class_="middle"))
    parts.append(tag("text", name, x=right, y=bottom + 16, class_="end"))
    return tag("g", *parts, class_="axes")


def _hits_label(one: Bin) -> str:
    return "1 hit" if one.high == 2 else f"{one.low:,.0f} to {one.high - 1:,.0f} hits"


def _idle_label(one: Bin) -> str:
    return f"{one.low:,.0f} to {one.high:,.0f} missed hits"


def _patience_mark(patience: Number, x: _Columns) -> Markup:
    at = x(min(patience if patience < 1 else 1 + math.log2(patience), MOST_BINS + 1))
    left = at > WIDTH / 2
    label = tag("text", "patience", x=place(at - 4 if left else at + 4), y=TOP + 9, class_="end" if left else "start")
    line = tag("line", x1=place(at), x2=place(at), y1=TOP, y2=HEIGHT - BOTTOM)
    return tag("g", tag("title", f"patience: {patience:,g} missed hits"), line, label, class_="mark neutral")


def _figure(name: str, caption: str, summary: str, title: str, parts: Sequence[Markup | None]) -> Markup:
    named = tag("title", f"{title}, {name}: {summary}" if summary else f"{title}, {name}")
    picture = tag("svg", named, *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")
    head = tag("figcaption", tag("span", name, class_="name"), tag("span", summary, class_="last") if summary else None)
    said = tag("p", caption, class_="caption") if caption else None
    return tag("figure", head, picture, said, class_="chart usage")


def _staircase(ordered: Sequence[int], active: int, x: Scale, y: Scale, colour: int) -> Markup:
    """Draw one step per distinct count; steps too narrow to be seen share one, as high as the first of them."""
    corners, first, last = [f"{place(x(0))},{place(y.start)}"], 0, 0
    for _, group in groupby(ordered[:active]):
        last += sum(1 for _ in group)
        if x(last) - x(first) < NARROWEST and last < active:
            continue
        height = place(y(ordered[first]))
        corners += [f"{place(x(first))},{height}", f"{place(x(last))},{height}"]
        first = last
    corners.append(f"{place(x(active))},{place(y.start)}")
    return tag("polygon", points=" ".join(corners), class_=f"bars {style(colour)}")


def _uniform_line(mean: float, x: Scale, y: Scale) -> Markup | None:
    if mean <= y.low:
        return None
    at = y(mean)
    line = tag("line", x1=x.start, x2=x.end, y1=place(at), y2=place(at), class_="dashed")
    return tag(
        "g", line, tag("text", "if all were used alike", x=x.end - 4, y=place(at - 5), class_="end"), class_="neutral"
    )


def _dead_codes(active: int, dead: int, x: Scale, y: Scale) -> Markup:
    left, width, bottom = x(active), x.end - x(active), y.start
    shade = tag("rect", x=place(left), width=place(width), y=place(y.end), height=place(bottom - y.end), class_="shade")
    text = f"{dead:,} dead"
    # Where the label has no room the figure's heading tells the count.
    fits = width > 7 * len(text) + 8
    label = tag("text", text, x=place(left + width / 2), y=place(bottom - 12), class_="middle") if fits else None
    return tag("g", shade, label, class_="dead")
