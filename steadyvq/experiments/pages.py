# SPDX-License-Identifier: Apache-2.0
"""The pages of an experiment, made from its record: tables in Markdown, charts as SVG, one HTML file."""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from steadyvq.experiments.markdown import markdown
from steadyvq.experiments.study import Measure, Study
from steadyvq.report.charts import Chart, Series, chart_figure, svg_file
from steadyvq.report.markup import Markup, tag
from steadyvq.report.markup import table as html_table
from steadyvq.report.page import document

Record = Mapping[str, Any]

PICTURES = {".gif": "image/gif", ".png": "image/png", ".svg": "image/svg+xml"}


def claim_rows(record: Record) -> list[list[str]]:
    """Claim, source, published, found, verdict."""
    return [
        [c["claim"], c["source"], c["published"] or "-", c["found"], f"**{c['verdict']}**"] for c in record["claims"]
    ]


CLAIM_HEAD = ["claim", "source", "published", "found here, mean [95 %]", "verdict"]


def arm_rows(study: Study, record: Record) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of arms: mean and standard deviation over seeds."""
    shown = [m for m in study.measures if any(_number(c, m) is not None for c in record["cells"] if not c["hidden"])]
    rows = []
    for arm in arms_of(record):
        own = [cell for cell in record["cells"] if cell["arm"] == arm]
        rows.append([f"`{arm}`", *(_mean(own, measure) for measure in shown), str(len(own))])
    return ["arm", *(measure.label for measure in shown), "seeds"], rows


def arms_of(record: Record) -> list[str]:
    """The arms that tables show, in their order."""
    return list(dict.fromkeys(cell["arm"] for cell in record["cells"] if not cell["hidden"]))


def _number(cell: Mapping[str, Any], measure: Measure) -> float | None:
    value = cell["found"].get(measure.name)
    return None if value is None else float(value)


def _mean(cells: Sequence[Mapping[str, Any]], measure: Measure) -> str:
    values = [value for value in (_number(cell, measure) for cell in cells) if value is not None]
    if not values:
        return "-"
    shown = f"{mean(values) * measure.scale:{measure.form}}"
    return shown if len(values) < 2 else f"{shown} ± {stdev(values) * measure.scale:{measure.form}}"


def claims_and_arms(study: Study, record: Record) -> str:
    """Both tables in Markdown, with what they were made of; what docs show of recorded evidence."""
    claims = markdown(CLAIM_HEAD, claim_rows(record))
    head, rows = arm_rows(study, record)
    return f"{claims}\n{markdown(head, rows)}\n{made_of(record)}\n"


def made_of(record: Record) -> str:
    """One line on how a record was made."""
    commits = ", ".join(str(commit)[:7] for commit in record["commits"])
    return (
        f"Profile `{record['profile']}`, {record['seeds']} seeds, {duration(record['seconds'])} of one core; commit {commits}, "
        f"torch {record['torch']}."
    )


def duration(seconds: float) -> str:
    """A time for readers."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def protocol_of(study: Study, record: Record) -> str:
    """The protocol with the settings of the profile."""
    return study.protocol.format(**record["settings"])


def as_markdown(study: Study, record: Record) -> str:
    """The experiment as a page of Markdown."""
    failed = "".join(f"- {f['arm']} with seed {f['seed']} failed: {f['reason']}\n" for f in record["failed"])
    parts = [f"# {study.title}", study.question, protocol_of(study, record), claims_and_arms(study, record)]
    parts += [failed] if failed else []
    return "\n\n".join([*parts, f"```bash\n{record['command']}\n```"]) + "\n"


def charts(study: Study, record: Record) -> list[tuple[str, Chart]]:
    """A chart for every curve that cells have."""
    found = []
    for curve in study.curves:
        series = [_series(record, arm, curve.name, colour) for colour, arm in enumerate(arms_of(record))]
        series = [one for one in series if one.points]
        if series:
            last = max(int(one.points[-1][0]) for one in series)
            limits = (0.0, 1.0) if curve.percent else None
            chart = Chart(curve.title, series, last, unit=curve.unit, percent=curve.percent, limits=limits, legend=True)
            found.append((curve.name, chart))
    return found


def _series(record: Record, arm: str, name: str, colour: int) -> Series:
    """The mean over seeds at the steps that all seeds have, shaded from the smallest to the largest."""
    cells = [cell["found"].get("curves", {}).get(name) for cell in record["cells"] if cell["arm"] == arm]
    curves = [{float(step): value for step, value in curve} for curve in cells if curve]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    values = {
        step: [v for v in (curve[step] for curve in curves) if v is not None and math.isfinite(v)] for step in steps
    }
    whole = {step: found for step, found in values.items() if len(found) == len(curves)}
    points: list[tuple[float, float | None]] = [(step, mean(found)) for step, found in whole.items()]
    band = [(step, min(found), max(found)) for step, found in whole.items()] if len(curves) > 1 else []
    return Series(arm, points, colour, band=band)


def plots(study: Study, record: Record) -> dict[str, str]:
    """Every chart as an SVG file of its own, by name."""
    return {name.replace("_", "-"): svg_file(chart) for name, chart in charts(study, record)}


def as_html(study: Study, record: Record, pictures: Sequence[Path] = ()) -> str:
    """The experiment as one HTML page that needs nothing else."""
    head, rows = arm_rows(study, record)
    body = [
        tag("header", tag("p", "SteadyVQ experiment", class_="brand"), tag("h1", study.title)),
        tag("p", study.question.replace("`", ""), class_="note"),
        tag("h2", "What was claimed"),
        html_table(CLAIM_HEAD, [_cells(row) for row in claim_rows(record)], class_="text"),
        tag("h2", "What was measured"),
        html_table(head, [_cells(row) for row in rows]),
        tag("p", "Mean ± standard deviation over seeds.", class_="small"),
        *_figures(study, record, pictures),
        tag("h2", "How"),
        tag("p", protocol_of(study, record)),
        tag("p", made_of(record).replace("`", ""), class_="small"),
        tag("pre", tag("code", record["command"])),
        tag("footer", f"SteadyVQ {record['steadyvq']}"),
    ]
    return document(study.title, body)


def _cells(row: Sequence[str]) -> Markup:
    first, *others = (cell.replace("`", "").replace("**", "") for cell in row)
    return tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in others))


def _figures(study: Study, record: Record, pictures: Sequence[Path]) -> list[Markup]:
    parts = []
    drawn = [chart_figure(chart) for _, chart in charts(study, record)]
    if drawn:
        parts += [tag("h2", "Curves"), tag("div", *drawn, class_="grid-of-figures")]
        parts.append(tag("p", "Mean over seeds, shaded from the smallest to the largest.", class_="small"))
    shown = [_picture(path) for path in pictures if path.suffix in PICTURES]
    return [*parts, tag("h2", "Pictures"), tag("div", *shown, class_="pictures")] if shown else parts


def _picture(path: Path) -> Markup:
    data = base64.b64encode(path.read_bytes()).decode()
    name = path.stem.replace("-", " ")
    image = tag("img", src=f"data:{PICTURES[path.suffix]};base64,{data}", alt=name)
    return tag("figure", image, tag("figcaption", name), class_="picture")
