# SPDX-License-Identifier: Apache-2.0
"""The evaluations of a report: every record of every run, with what it was measured on."""

from collections.abc import Callable, Sequence
from typing import Any

from steadyvq.report.markup import Markup, join, table, tag
from steadyvq.report.overview import swatch
from steadyvq.report.runs import Run, by_training, number
from steadyvq.report.table import MISSING, percent

Record = dict[str, Any]


def evaluation_section(runs: Sequence[Run]) -> list[Markup]:
    """Return one row per record, the newest of each run first, and how they were measured, folded."""
    if not any(run.records for run in runs):
        return []
    several = len(runs) > 1
    protocols = _protocols(runs)
    columns = [column for column in _COLUMNS if column[0] not in _OPTIONAL or _measured(runs, _OPTIONAL[column[0]])]
    rows = []
    for i, run in enumerate(runs):
        name = [tag("th", swatch(i), run.label, scope="row")] if several else []
        for record in reversed(run.records):
            cells = [tag("td", show(record)) for _, show in columns]
            measured = tag("td", list(protocols).index(_protocol(record)) + 1)
            rows.append(tag("tr", *name, _step(run, record), *cells, measured))
    names = (*(["run"] if several else []), "step", *(name for name, _ in columns), "protocol")
    return [
        tag("h2", "Evaluations"),
        tag("div", table(names, rows, class_="records"), class_="tall"),
        _details(protocols),
    ]


def _step(run: Run, record: Record) -> Markup:
    step = _number(record, "step", ",.0f")
    if not by_training(record):
        return tag("td", _with_small(step, "eval"))
    best = number(run.best.get("step"))
    if best is None or best != number(record.get("step")):
        return tag("td", step)
    return tag("td", _with_small(step, f"best {run.best.get('metric', '')}".rstrip()), class_="best")


def _number(record: Record, key: str, form: str) -> str:
    value = number(record.get(key))
    if value is not None:
        return format(value, form)
    # JSON has no infinity; records spell it out.
    return str(record[key]) if record.get(key) in ("inf", "-inf", "nan") else MISSING


def _with_small(value: str, detail: str) -> Markup:
    return join(value, tag("small", f" {detail}") if detail else None)


def _psnr(record: Record) -> Markup:
    low, high = (_number(record, key, ".2f") for key in ("psnr_low", "psnr_high"))
    return _with_small(_number(record, "psnr", ".2f"), "" if MISSING in (low, high) else f"[{low}, {high}]")


def _utilization(record: Record) -> Markup:
    active, codes = (_number(record, key, ",.0f") for key in ("active", "num_codes"))
    detail = "" if MISSING in (active, codes) else f"{active} of {codes}"
    return _with_small(percent(number(record.get("utilization"))), detail)


def _ceiling(record: Record) -> Markup:
    tokens = _number(record, "tokens", ",.0f")
    return _with_small(percent(number(record.get("ceiling"))), "" if tokens == MISSING else f"{tokens} tokens")


def _images(record: Record) -> Markup:
    photographs = _number(record, "photographs", ",.0f")
    detail = "" if photographs == MISSING else f"of {photographs} photos"
    return _with_small(_number(record, "count", ",.0f"), detail)


_COLUMNS: tuple[tuple[str, Callable[[Record], object]], ...] = (
    ("data", lambda record: record.get("data", MISSING)),
    ("split", lambda record: record.get("split", MISSING)),
    ("crop", lambda record: _number(record, "crop", ",.0f")),
    ("images", _images),
    ("PSNR (dB)", _psnr),
    ("SSIM", lambda record: _number(record, "ssim", ".3f")),
    ("LPIPS alex", lambda record: _number(record, "lpips_alex", ".4f")),
    ("LPIPS vgg", lambda record: _number(record, "lpips_vgg", ".4f")),
    ("rFID", lambda record: _number(record, "rfid", ".2f")),
    ("KID", lambda record: _number(record, "kid", ".5f")),
    ("FD-Lite0", lambda record: _number(record, "fd_lite0", ".3f")),
    ("KID-Lite0", lambda record: _number(record, "kid_lite0", ".5f")),
    ("utilization", _utilization),
    ("ceiling", _ceiling),
    ("perplexity", lambda record: _number(record, "perplexity", ",.0f")),
    ("relative error", lambda record: _number(record, "relative_error", ".3f")),
)

_OPTIONAL = {
    "LPIPS alex": "lpips_alex",
    "LPIPS vgg": "lpips_vgg",
    "rFID": "rfid",
    "KID": "kid",
    "FD-Lite0": "fd_lite0",
    "KID-Lite0": "kid_lite0",
}
"""Columns that are shown where a record has their number."""


def _measured(runs: Sequence[Run], key: str) -> bool:
    return any(number(record.get(key)) is not None for run in runs for record in run.records)


def _protocol(record: Record) -> tuple[str, ...]:
    return tuple(str(record.get(key, "")) for key in ("protocol", "pixels_hash", "version"))


def _protocols(runs: Sequence[Run]) -> dict[tuple[str, ...], dict[str, None]]:
    """Return the different ways of measuring, each with the configurations it was used for."""
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for run in runs:
        for record in reversed(run.records):
            name = f" ({run.label})" if len(runs) > 1 else ""
            found.setdefault(_protocol(record), {})[f"{record.get('config_hash') or MISSING}{name}"] = None
    return found


def _details(protocols: dict[tuple[str, ...], dict[str, None]]) -> Markup:
    items = []
    for (protocol, pixels, version), configurations in protocols.items():
        facts = (
            ("pixels", tag("code", pixels) if pixels else None),
            ("SteadyVQ", version or None),
            ("configuration", tag("code", ", ".join(configurations))),
        )
        said = [join(f"{name} ", value) for name, value in facts if value is not None]
        lines = [tag("p", f"{protocol}.") if protocol else None, *(tag("p", line, class_="small") for line in said)]
        items.append(tag("li", *lines))
    summary = tag("summary", "How they were measured: protocols and hashes")
    return tag("details", summary, tag("ol", *items))
