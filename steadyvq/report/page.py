# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that needs nothing else, of one run or of several side by side."""

import base64
import io
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from PIL import Image

from steadyvq.report.charts import chart_figure, style, usage_figure
from steadyvq.report.curves import QUALITY, STABILITY, Topic, charts, losses, remaining
from steadyvq.report.markup import Markup, join, tag
from steadyvq.report.runs import Run, number, read_runs
from steadyvq.report.style import STYLE
from steadyvq.report.table import (
    COLUMNS,
    MISSING,
    best_runs,
    codes,
    duration,
    evaluated_differently,
    percent,
)

# The page itself forbids the browser to load anything, whatever a run's texts may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
EARLIER_PICTURES = 5


def write_report(runs: Sequence[Path], out: Path, title: str | None = None, note: str | None = None) -> Path:
    """Write one self-contained HTML page: numbers, curves, pictures, code usage, configuration.

    Args:
        runs: run folders; one shows everything about it, several are compared.
        out: the HTML file.
        title: heading of the page; the run's title if None.
        note: a paragraph under the heading.

    Returns:
        The file that was written.

    Raises:
        ValueError: a folder holds no log.
    """
    page = _page(read_runs(runs), title, note)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _page(runs: Sequence[Run], title: str | None, note: str | None) -> str:
    single = len(runs) == 1
    heading = title or (runs[0].label if single else f"{len(runs)} runs side by side")
    body = [
        tag("header", tag("p", "SteadyVQ report", class_="brand"), tag("h1", heading), _facts(runs)),
        tag("p", note, class_="note") if note else None,
        _tiles(runs[0]) if single else _table(runs),
        _measured_on(runs),
        *_curve_sections(runs),
        *_picture_section(runs),
        *_usage_section(runs),
        *_stage_section(runs),
        *_run_section(runs),
        _footer(runs),
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", heading),
        tag("style", Markup(STYLE)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", *body)), lang="en") + "\n"


def _facts(runs: Sequence[Run]) -> Markup | None:
    if len(runs) > 1:
        return None
    run = runs[0]
    facts = [str(run.info.get("status") or ""), f"{run.last_step:,} steps"]
    facts += [f"started {_readable_time(run.info['started'])}"] if run.info.get("started") else []
    facts += [f"configuration {run.info['config_hash']}"] if run.info.get("config_hash") else []
    return tag("p", " · ".join(fact for fact in facts if fact), class_="facts")


def _readable_time(text: object) -> str:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return str(text)
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def _tiles(run: Run) -> Markup:
    low, high = run.final("psnr_low"), run.final("psnr_high")
    interval = "" if low is None or high is None else f"95 % interval {low:.2f} to {high:.2f}"
    ceiling = run.final("ceiling")
    entries = [
        ("PSNR", _plain(run.final("psnr"), ".2f", " dB"), interval),
        ("SSIM", _plain(run.final("ssim"), ".3f"), ""),
        ("Codes used", percent(run.final("utilization")), codes(run) if run.active is not None else ""),
        ("Perplexity", _plain(run.final("perplexity"), ",.0f"), f"of {run.num_codes:,}" if run.num_codes else ""),
        ("Relative error", _plain(run.final("relative_error"), ".3f"), ""),
        ("Time", duration(run.seconds), f"{run.last_step:,} steps"),
    ]
    if ceiling is not None:
        entries[2] = (*entries[2][:2], f"{entries[2][2]}, ceiling {percent(ceiling)}")
    tiles = [
        tag("div", tag("dt", name), tag("dd", value, tag("small", detail) if detail else None))
        for name, value, detail in entries
    ]
    return tag("dl", *tiles, class_="tiles")


def _plain(value: float | None, form: str, unit: str = "") -> str:
    return MISSING if value is None else f"{value:{form}}{unit}"


def _table(runs: Sequence[Run]) -> Markup:
    best = [best_runs(column, runs) for column in COLUMNS]
    head = tag("tr", *(tag("th", name, scope="col") for name in ("run", *(column.name for column in COLUMNS))))
    rows = []
    for i, run in enumerate(runs):
        cells = [
            tag("td", _with_interval(column.show(run)), class_="best" if i in winners else None)
            for column, winners in zip(COLUMNS, best, strict=True)
        ]
        rows.append(tag("tr", tag("th", _swatch(i), run.label, _status(run), scope="row"), *cells))
    different = evaluated_differently(runs)
    warning = f"These runs were not measured on the same images ({', '.join(different)} differ): do not rank them."
    return join(
        tag("h2", "Final numbers"),
        tag("p", warning, class_="warning") if different else None,
        tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll"),
        tag("p", "Marked: the best value of a column. Brackets: 95 % interval over photographs.", class_="small"),
    )


def _with_interval(text: str) -> Markup:
    value, bracket, interval = text.partition(" [")
    return join(value, tag("small", f" [{interval}")) if bracket else join(text)


def _status(run: Run) -> Markup | None:
    status = str(run.info.get("status", "done"))
    return None if status == "done" else tag("small", f" ({status} at step {run.last_step:,})")


def _swatch(colour: int) -> Markup:
    line = tag("line", x1=1, y1=5, x2=19, y2=5)
    return tag("svg", line, viewBox="0 0 20 10", class_=f"swatch {style(colour)}", aria_hidden="true")


def _measured_on(runs: Sequence[Run]) -> Markup | None:
    records = [run.records[-1] for run in runs if run.records]
    if not records or evaluated_differently(runs):
        return None
    record = records[0]
    facts = [
        (f"{count:,.0f} images" if (count := number(record.get("count"))) is not None else "held-out images"),
        f"of {record['crop']}×{record['crop']} pixels" if "crop" in record else "",
        f"from {record['photographs']} photographs" if "photographs" in record else "",
        f"({record.get('data', 'data')}, {record['split']} split)" if "split" in record else "",
    ]
    protocol = f" {record['protocol']}." if record.get("protocol") else ""
    return tag("p", f"Measured on {' '.join(fact for fact in facts if fact)}.{protocol}", class_="small")


def _curve_sections(runs: Sequence[Run]) -> list[Markup]:
    if not any(run.keys(kind) for run in runs for kind in ("train", "probe", "eval")):
        return [tag("h2", "Curves"), tag("p", "The log holds no numbers yet.")]
    # The losses of one run are one chart, which fits beside the others; those of several are a chart each.
    by_name = losses(runs)
    if len(runs) == 1:
        sections = [("Quality", (*QUALITY, *by_name)), ("Stability", STABILITY)]
    else:
        sections = [("Quality", QUALITY), ("Stability", STABILITY), ("Losses", tuple(by_name))]
    shown = [part for name, topics in sections for part in _figures(runs, name, topics)]
    others = [chart_figure(chart) for chart in charts(runs, remaining(runs))]
    if others:
        summary = tag("summary", f"Everything else that was logged ({len(others)})")
        shown.append(tag("details", summary, tag("div", *others, class_="grid-of-figures"), class_="others"))
    return shown


def _figures(runs: Sequence[Run], name: str, topics: Sequence[Topic]) -> list[Markup]:
    figures = [chart_figure(chart) for chart in charts(runs, topics)]
    return [tag("h2", name), tag("div", *figures, class_="grid-of-figures")] if figures else []


def _picture_section(runs: Sequence[Run]) -> list[Markup]:
    newest = []
    for run in runs:
        caption = [run.label] if len(runs) > 1 else []
        # A picture whose file is damaged is left out; the one before it is the newest then.
        usable = (picture for name, path in reversed(run.pictures) if (picture := _picture(path, [*caption, name])))
        newest.append(next(usable, None))
    if not any(newest):
        return []
    said = tag("p", "Held-out images above, their reconstructions below.", class_="small")
    parts = [tag("h2", "Pictures"), tag("div", *newest, class_="pictures"), said]
    return [*parts, _earlier(runs[0])] if len(runs) == 1 and len(runs[0].pictures) > 1 else parts


def _earlier(run: Run) -> Markup:
    before = run.pictures[:-1]
    count = min(EARLIER_PICTURES, len(before))
    chosen = [before[i * (len(before) - 1) // max(1, count - 1)] for i in range(count)]
    pictures = [_picture(path, [name]) for name, path in chosen]
    summary = tag("summary", f"Earlier pictures ({count} of {len(before)})")
    return tag("details", summary, tag("div", *pictures, class_="pictures"))


def _picture(path: Path, caption: Sequence[str]) -> Markup | None:
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.verify()
            width, height = image.size
    except (OSError, SyntaxError, ValueError):
        return None
    zoom = max(1, 500 // width)
    image_tag = tag(
        "img",
        src=f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}",
        width=width * zoom,
        height=height * zoom,
        alt=f"Images and their reconstructions: {', '.join(caption)}",
    )
    *name, step = caption
    label = [tag("span", part, class_="name") for part in name]
    return tag("figure", image_tag, tag("figcaption", *label, tag("span", step, class_="last")), class_="picture")


def _usage_section(runs: Sequence[Run]) -> list[Markup]:
    known = [(i, run, run.counts) for i, run in enumerate(runs) if run.counts]
    if not known:
        return []
    highest = max(max(counts) for _, _, counts in known)
    figures = [usage_figure(run.label, counts, i, highest) for i, run, counts in known]
    said = "Hits of each code on the held-out images, the most used code first; a dead code was never hit."
    grid = tag("div", *figures, class_="grid-of-figures")
    return [tag("h2", "Code usage"), grid, tag("p", said, class_="small")]


def _stage_section(runs: Sequence[Run]) -> list[Markup]:
    rows = []
    for run in runs:
        name = [tag("td", run.label)] if len(runs) > 1 else []
        for row in run.stages():
            cells = (f"{row['step']:,.0f}", row.get("epoch", MISSING), row.get("stage", MISSING), row.get("reason", ""))
            rows.append(tag("tr", *name, *(tag("td", cell) for cell in cells)))
    if len(rows) <= len(runs):
        return []
    names = [*(["run"] if len(runs) > 1 else []), "step", "epoch", "stage", "why it began"]
    head = tag("tr", *(tag("th", name, scope="col") for name in names))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="text")
    return [tag("h2", "Stages"), tag("div", table, class_="scroll")]


def _run_section(runs: Sequence[Run]) -> list[Markup]:
    parts = []
    for run in runs:
        command = run.info.get("command")
        if not command and run.config is None:
            continue
        name = f"{run.label}: configuration" if len(runs) > 1 else "Resolved configuration"
        said = tag("p", tag("code", command), class_="small") if command else None
        text = tag("pre", run.config) if run.config is not None else None
        parts.append(tag("details", tag("summary", name), said, text, class_="config"))
    return [tag("h2", "How to repeat it"), *parts] if parts else []


def _footer(runs: Sequence[Run]) -> Markup:
    versions = sorted({str(run.info["steadyvq"]) for run in runs if run.info.get("steadyvq")})
    return tag("footer", f"SteadyVQ {', '.join(versions)}".strip())
