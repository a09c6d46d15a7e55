# SPDX-License-Identifier: Apache-2.0
"""The head of a report: what the run is, its final numbers, and what they were measured on."""

from collections.abc import Sequence
from datetime import datetime

from steadyvq.report.charts import style
from steadyvq.report.markup import Markup, join, table, tag
from steadyvq.report.runs import Run, number
from steadyvq.report.scales import value_label
from steadyvq.report.table import COLUMNS, MISSING, best_runs, codes, duration, evaluated_differently, percent, refusal

MARKED = "Marked: the best value of a column. "


def facts(run: Run) -> Markup:
    """Return a line on how far the run came, when it began, and its configuration."""
    said = [str(run.info.get("status") or ""), f"{run.last_step:,} steps"]
    said += [f"started {_readable_time(run.info['started'])}"] if run.info.get("started") else []
    said += [f"configuration {run.info['config_hash']}"] if run.info.get("config_hash") else []
    said += [_best(run)]
    return tag("p", " · ".join(fact for fact in said if fact), class_="facts")


def _best(run: Run) -> str:
    step, value = number(run.best.get("step")), number(run.best.get("value"))
    if step is None or value is None:
        return ""
    return f"best {run.best.get('metric', 'value')} {value_label(value)} at step {step:,.0f}"


def _readable_time(text: object) -> str:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return str(text)
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def tiles(run: Run) -> Markup:
    """Return the final numbers of one run, large."""
    time = ("Time", duration(run.seconds), f"{run.last_step:,} steps")
    if run.is_prior:
        images, error = run.final("held_out_images"), run.final("prediction_error")
        if error is not None:
            return _tiles([("Prediction error", _plain(error, ".4f"), "squared, of held-out images"), time])
        entries = [
            ("Cross-entropy", _plain(run.final("cross_entropy"), ".3f", " nats"), "per token of held-out images"),
            (
                "Bits per image",
                _plain(run.final("bits_per_image"), ",.0f"),
                f"over {images:,.0f} images" if images else "",
            ),
            time,
        ]
        return _tiles(entries)
    low, high = run.final("psnr_low"), run.final("psnr_high")
    interval = "" if low is None or high is None else f"95 % interval {low:.2f} to {high:.2f}"
    ceiling = run.final("ceiling")
    used = [codes(run) if run.active is not None else "", f"ceiling {percent(ceiling)}" if ceiling is not None else ""]
    entries = [
        ("PSNR", _plain(run.final("psnr"), ".2f", " dB"), interval),
        ("SSIM", _plain(run.final("ssim"), ".3f"), ""),
        ("Codes used", percent(run.final("utilization")), ", ".join(part for part in used if part)),
        ("Perplexity", _plain(run.final("perplexity"), ",.0f"), f"of {run.num_codes:,}" if run.num_codes else ""),
        ("Relative error", _plain(run.final("relative_error"), ".3f"), ""),
        time,
    ]
    return _tiles(entries)


def _tiles(entries: Sequence[tuple[str, str, str]]) -> Markup:
    shown = [
        tag("div", tag("dt", name), tag("dd", value, tag("small", detail) if detail else None))
        for name, value, detail in entries
    ]
    return tag("dl", *shown, class_="tiles")


def _plain(value: float | None, form: str, unit: str = "") -> str:
    return MISSING if value is None else f"{value:{form}}{unit}"


def final_table(runs: Sequence[Run]) -> Markup:
    """Return the final numbers of several runs, the best of each column marked."""
    warning = refusal(runs)
    best = [set[int]() if warning else best_runs(column, runs) for column in COLUMNS]
    rows = []
    for i, run in enumerate(runs):
        cells = [
            tag("td", _with_interval(column.show(run)), class_="best" if i in winners else None)
            for column, winners in zip(COLUMNS, best, strict=True)
        ]
        rows.append(tag("tr", tag("th", swatch(i), run.label, _status(run), scope="row"), *cells))
    return join(
        tag("h2", "Final numbers"),
        tag("p", warning, class_="warning") if warning else None,
        table(("run", *(column.name for column in COLUMNS)), rows),
        tag("p", f"{'' if warning else MARKED}Brackets: 95 % interval over photographs.", class_="small"),
    )


def _with_interval(text: str) -> Markup:
    value, bracket, interval = text.partition(" [")
    return join(value, tag("small", f" [{interval}")) if bracket else join(text)


def _status(run: Run) -> Markup | None:
    status = str(run.info.get("status", "done"))
    return None if status == "done" else tag("small", f" ({status} at step {run.last_step:,})")


def swatch(colour: int) -> Markup:
    """Return a short line in the colour of a run."""
    line = tag("line", x1=1, y1=5, x2=19, y2=5)
    return tag("svg", line, viewBox="0 0 20 10", class_=f"swatch {style(colour)}", aria_hidden="true")


def measured_on(runs: Sequence[Run]) -> Markup | None:
    """Return a sentence on the images behind the final numbers, where all runs share them."""
    records = [record for run in runs for record in run.final_records]
    if not records or evaluated_differently(runs):
        return None
    record = records[0]
    said = [
        (f"{count:,.0f} images" if (count := number(record.get("count"))) is not None else "held-out images"),
        f"of {record['crop']}×{record['crop']} pixels" if "crop" in record else "",
        f"from {record['photographs']} photographs" if "photographs" in record else "",
        f"({record.get('data', 'data')}, {record['split']} split)" if "split" in record else "",
    ]
    protocol = f" {record['protocol']}." if record.get("protocol") else ""
    return tag("p", f"Measured on {' '.join(fact for fact in said if fact)}.{protocol}", class_="small")
