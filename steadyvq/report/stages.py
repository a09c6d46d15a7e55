# SPDX-License-Identifier: Apache-2.0
"""The stages of a report: when each began and why, how long it lasted, and what it changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from steadyvq.report.configuration import compact
from steadyvq.report.markup import Markup, table, tag
from steadyvq.report.overview import swatch
from steadyvq.report.runs import Run
from steadyvq.report.table import MISSING

# Conditions of the plateau rule, which mean nothing where a stage has no such rule.
_PLATEAU = {"patience", "min_epochs", "min_delta"}


def stage_section(runs: Sequence[Run]) -> list[Markup]:
    """Return the table of stages; empty where no run has more than one stage, or any with settings of its own."""
    several = len(runs) > 1
    rows, worth = [], False
    for i, run in enumerate(runs):
        planned = _planned(run)
        cells = [*_begun(run, planned), *_not_reached(run, planned)]
        worth = worth or len(cells) > 1 or any(row[3] for row in cells)
        name = [tag("th", swatch(i), run.label, scope="row")] if several else []
        rows += [tag("tr", *name, *(tag("td", cell) for cell in row)) for row in cells]
    names = (*(["run"] if several else []), "stage", "from step", "lasted", "differs in", "ends with", "why it began")
    return [tag("h2", "Stages"), table(names, rows, class_="text stages")] if worth else []


def _planned(run: Run) -> dict[str, Mapping[str, Any]]:
    stages = run.settings.get("stages")
    if not isinstance(stages, list):
        return {}
    return {str(stage["name"]): stage for stage in stages if isinstance(stage, Mapping) and "name" in stage}


def _begun(run: Run, planned: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    begun = run.stages()
    ends = [*(float(row["step"]) for row in begun[1:]), float(run.last_step)]
    rows: list[tuple[str, ...]] = []
    for row, end in zip(begun, ends, strict=False):
        name = str(row.get("stage") or MISSING)
        step, stage = float(row["step"]), planned.get(name, {})
        lasted = _lasted(end - step, run.steps_per_epoch)
        rows.append((name, f"{step:,.0f}", lasted, _settings(stage), _until(stage), str(row.get("reason") or "")))
    return rows


def _not_reached(run: Run, planned: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    begun = {str(row.get("stage")) for row in run.stages()}
    left = [(name, stage) for name, stage in planned.items() if name not in begun]
    return [(name, MISSING, "not reached", _settings(stage), _until(stage), "") for name, stage in left if begun]


def _lasted(steps: float, steps_per_epoch: float | None) -> str:
    said = _count(f"{steps:,.0f}", "step")
    if not steps_per_epoch:
        return said
    return f"{said}, {_count(f'{steps / steps_per_epoch:,.1f}'.removesuffix('.0'), 'epoch')}"


def _count(number: str, noun: str) -> str:
    return f"{number}\N{NO-BREAK SPACE}{noun}{'' if number == '1' else 's'}"


def _settings(stage: Mapping[str, Any]) -> str:
    """Return whatever a stage sets, by its own words, so that a setting of a later version is shown as well."""
    own = {
        key: value for key, value in stage.items() if key not in ("name", "until") and value not in (None, [], {}, "")
    }
    return "; ".join(f"{key} {compact(value)}" for key, value in own.items())


def _until(stage: Mapping[str, Any]) -> str:
    until = stage.get("until")
    if not isinstance(until, Mapping):
        return ""
    watching = until.get("plateau") is not None
    held = [(key, value) for key, value in until.items() if value is not None and (watching or key not in _PLATEAU)]
    return ", ".join(f"{key} {compact(value)}" for key, value in held)
