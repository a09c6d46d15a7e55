# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that needs nothing else, of one run or of several side by side."""

import os
from collections.abc import Sequence
from pathlib import Path

from steadyvq.report.charts import chart_figure
from steadyvq.report.codebook import codebook_section
from steadyvq.report.configuration import configuration_section, difference_section
from steadyvq.report.curves import ADVERSARIAL, QUALITY, STABILITY, Topic, charts, losses, remaining
from steadyvq.report.evaluations import evaluation_section
from steadyvq.report.gallery import picture_section
from steadyvq.report.markup import Markup, tag
from steadyvq.report.overview import facts, final_table, measured_on, tiles
from steadyvq.report.runs import Run, read_runs
from steadyvq.report.stages import stage_section
from steadyvq.report.style import STYLE

# The page itself forbids the browser to load anything, whatever a run's texts may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(runs: Sequence[Path], out: Path, title: str | None = None, note: str | None = None) -> Path:
    """Write one self-contained HTML page: numbers, curves, pictures, code usage, evaluations, configuration.

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
        tag(
            "header",
            tag("p", "SteadyVQ report", class_="brand"),
            tag("h1", heading),
            facts(runs[0]) if single else None,
        ),
        tag("p", note, class_="note") if note else None,
        tiles(runs[0]) if single else final_table(runs),
        measured_on(runs),
        *difference_section(runs),
        *_curve_sections(runs),
        *picture_section(runs),
        *codebook_section(runs),
        *stage_section(runs),
        *evaluation_section(runs),
        *configuration_section(runs),
        _footer(runs),
    ]
    return document(heading, body)


def document(title: str, body: Sequence[Markup | None]) -> str:
    """Return a whole HTML page that loads nothing."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", *body)), lang="en") + "\n"


def _curve_sections(runs: Sequence[Run]) -> list[Markup]:
    if not any(run.keys(kind) for run in runs for kind in ("train", "probe", "eval")):
        return [tag("h2", "Curves"), tag("p", "The log holds no numbers yet.")]
    # The losses of one run are one chart, which fits beside the others; those of several are a chart each.
    by_name = losses(runs)
    if len(runs) == 1:
        sections = [("Quality", (*QUALITY, *by_name)), ("Stability", STABILITY)]
    else:
        sections = [("Quality", QUALITY), ("Stability", STABILITY), ("Losses", tuple(by_name))]
    sections.append(("Adversarial training", ADVERSARIAL))
    shown = [part for name, topics in sections for part in _curve_figures(runs, name, topics)]
    others = [chart_figure(chart) for chart in charts(runs, remaining(runs))]
    if others:
        summary = tag("summary", f"Everything else that was logged ({len(others)})")
        shown.append(tag("details", summary, _grid(others), class_="others"))
    return shown


def _curve_figures(runs: Sequence[Run], name: str, topics: Sequence[Topic]) -> list[Markup]:
    figures = [chart_figure(chart) for chart in charts(runs, topics)]
    return [tag("h2", name), _grid(figures)] if figures else []


def _grid(figures: Sequence[Markup]) -> Markup:
    return tag("div", *figures, class_="grid-of-figures")


def _footer(runs: Sequence[Run]) -> Markup:
    versions = sorted({str(run.info["steadyvq"]) for run in runs if run.info.get("steadyvq")})
    return tag("footer", f"SteadyVQ {', '.join(versions)}".strip())
