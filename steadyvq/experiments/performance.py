# SPDX-License-Identifier: Apache-2.0
"""Tables and the plot of docs/performance.md, from the record that `benchmarks/speed.py` writes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from steadyvq.experiments.markdown import markdown

Row = Mapping[str, Any]


def _size(row: Row) -> str:
    return " x ".join(f"{number:,}" for number in row["size"])


def _ratio(row: Row, digits: int = 2) -> str:
    shown = (f"{row[name]:.{digits}f}" for name in ("ratio", "low", "high"))
    return "{} [{}, {}]".format(*shown)


def _ms(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def search_table(rows: Sequence[Row]) -> str:
    """Exact search against rivals."""
    head = ["N x K x d", "input", "ours, ms", "floor, ms", "rival", "rival, ms", "rival / ours [95 %]", "same codes"]
    cells = [
        [
            _size(row),
            row["input"],
            _ms(row["ours_ms"]),
            _ms(row["floor_ms"]),
            row["rival"],
            _ms(row["rival_ms"]),
            _ratio(row),
            f"{100 * row['agree']:.2f} %",
        ]
        for row in rows
    ]
    return markdown(head, cells)


def memory_table(rows: Sequence[Row]) -> str:
    """Peak memory of searches."""
    return markdown(
        ["N x K x d", "search", "extra, MB"], [[_size(r), r["form"], f"{r['extra_mb']:,.0f}"] for r in rows]
    )


def dense_table(rows: Sequence[Row]) -> str:
    """The non-stationary loss against rivals."""
    head = ["N x K x d", "ours, ms", "floor, ms", "x floor", "extra, MB", "rival", "rival, ms", "rival / ours [95 %]"]
    cells = [
        [
            _size(row),
            _ms(row["ours_ms"]),
            _ms(row["floor_ms"]),
            f"{row['ours_ms'] / row['floor_ms']:.2f}",
            f"{row['extra_mb']:.0f}",
            row["rival"],
            _ms(row["rival_ms"]),
            _ratio(row, 1),
        ]
        for row in rows
    ]
    return markdown([*head, "error"], [[*c, f"{row['error']:.0e}"] for c, row in zip(cells, rows, strict=True)])


def step_table(rows: Sequence[Row]) -> str:
    """Training steps, pair by pair."""
    cells = [[row["ours"], _ms(row["ours_ms"]), row["rival"], _ms(row["rival_ms"]), _ratio(row, 3)] for row in rows]
    return markdown(["first", "ms", "second", "ms", "second / first [95 %]"], cells)


def scaling_table(rows: Sequence[Row]) -> str:
    """Times and memory against the number of codes and of latents, and the slopes."""
    cells = [
        [
            _size(row),
            _ms(row["search_ms"]),
            _ms(row["dense_ms"]),
            f"{row['extra_mb']:.0f}",
            f"{4e-6 * row['size'][0] * row['size'][1]:,.0f}",
        ]
        for row in rows
        if "size" in row
    ]
    slopes = "".join(
        f"- slope of the {'search' if row['slope_of'] == 'search_ms' else 'NS loss'} against the number of {row['against']}, "
        f"log-log, over the last three sizes: {row['slope']:.2f}\n"
        for row in rows
        if "slope" in row
    )
    head = ["N x K x d", "search, ms", "NS loss, ms", "step of nsvq: extra MB", "one N x K matrix, MB"]
    return markdown(head, cells) + "\n" + slopes


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 360, 64, 40, 16


def scaling_plot(rows: Sequence[Row]) -> str:
    """Times of search and dense loss against K, both axes logarithmic, as SVG."""
    points = [row for row in rows if row.get("against") == "codes" and "size" in row]
    codes = [row["size"][1] for row in points]
    times = [row[name] for row in points for name in ("search_ms", "dense_ms")]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))

    def x(value: float) -> float:
        share = math.log(value / codes[0]) / math.log(codes[-1] / codes[0])
        return round(_LEFT + share * (_WIDTH - _LEFT - 90), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (math.log10(value) - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP), 1)

    style = 'font-family="sans-serif" font-size="13" fill="#555"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {style}>']
    parts.append(f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>')
    for power in range(low, high + 1):
        at = y(10**power)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 90}" y1="{at}" y2="{at}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4}" text-anchor="end">{10.0**power:g} ms</text>')
    for value in codes:
        parts.append(f'<text x="{x(value)}" y="{_HEIGHT - 16}" text-anchor="middle">{value:,}</text>')
    for name, label, colour in (("search_ms", "search", "#1f77b4"), ("dense_ms", "NS loss", "#d62728")):
        line = " ".join(f"{x(row['size'][1])},{y(row[name])}" for row in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        end = y(points[-1][name])
        parts.append(f'<text x="{_WIDTH - 82}" y="{end + 4}" fill="{colour}">{label}</text>')
    n, _, d = points[0]["size"]
    parts.append(
        f'<text x="{_LEFT}" y="12">CPU time against the number of codes; {n:,} latents of {d} dimensions</text>'
    )
    return "\n".join([*parts, "</svg>", ""])
