# SPDX-License-Identifier: Apache-2.0
"""The configurations of a report: where those of several runs differ, and each of them whole."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steadyvq.report.markup import Markup, table, tag
from steadyvq.report.runs import Run
from steadyvq.report.table import MISSING

ABSENT = object()
# The names of the runs, which every table shows anyway.
_LEFT_OUT = {"title"}


def compact(value: object, inside: bool = False) -> str:
    """Return a setting on one line, in the words of a configuration file; the outermost needs no brackets."""
    if value is ABSENT:
        return MISSING
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, Mapping):
        text = ", ".join(f"{key}: {compact(entry, True)}" for key, entry in value.items())
        return f"{{{text}}}" if inside or not text else text
    if isinstance(value, list):
        text = ", ".join(compact(entry, True) for entry in value)
        return f"[{text}]" if inside or not text else text
    return str(value)


def differences(settings: Sequence[Mapping[str, Any]], prefix: str = "") -> Iterator[tuple[str, list[object]]]:
    """Yield the dotted names in which configurations differ, with one value each.

    What one of them lacks altogether is one difference, however much it holds. Lists of named entries, such as stages,
    are compared by name.

    Args:
        settings: plain configurations.
        prefix: of the names.
    """
    for key in dict.fromkeys(key for one in settings for key in one if prefix or key not in _LEFT_OUT):
        values = [one.get(key, ABSENT) for one in settings]
        inner = [named for value in values if isinstance(named := _by_name(value), Mapping)]
        if len(inner) == len(values):
            yield from differences(inner, f"{prefix}{key}.")
        elif any(value != values[0] for value in values):
            yield f"{prefix}{key}", [_without_empty(value) for value in values] if ABSENT in values else values


def _without_empty(value: object) -> object:
    """Return settings without those that are null or empty, which say little where another run has none of them."""
    if not isinstance(value, Mapping):
        return value
    kept = {key: _without_empty(entry) for key, entry in value.items()}
    return {key: entry for key, entry in kept.items() if entry not in (None, [], {})}


def _by_name(value: object) -> object:
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) and "name" in entry for entry in value):
        return value
    named = {str(entry["name"]): {k: v for k, v in entry.items() if k != "name"} for entry in value}
    return named if value and len(named) == len(value) else value


def difference_section(runs: Sequence[Run]) -> list[Markup]:
    """Return a table of the settings in which runs differ, one column per run; empty for a single configuration."""
    known = [run for run in runs if run.settings]
    if len(known) < 2:
        return []
    heading = tag("h2", "Where the configurations differ")
    rows = [
        tag("tr", tag("th", *_breakable(name), scope="row"), *(tag("td", compact(value)) for value in values))
        for name, values in differences([run.settings for run in known])
    ]
    if not rows:
        return [heading, tag("p", "Nowhere: these runs were made with the same settings.")]
    return [heading, table(("setting", *(run.label for run in known)), rows, class_="text settings")]


def _breakable(name: str) -> Iterator[str]:
    """Yield the parts of a dotted name with the places between where a narrow page may break it."""
    for i, part in enumerate(name.split(".")):
        yield from (".", tag("wbr"), part) if i else (part,)


def configuration_section(runs: Sequence[Run]) -> list[Markup]:
    """Return the command and the resolved configuration of each run, folded."""
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
