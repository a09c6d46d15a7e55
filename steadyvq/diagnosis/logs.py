# SPDX-License-Identifier: Apache-2.0
"""Reading the log of a monitor: a file of JSON lines of its own, or the log of a run of ours, which holds its rows too."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

LOG_NAMES = ("log.jsonl", "monitor.jsonl")
Row = dict[str, Any]


@dataclass(frozen=True)
class MonitorLog:
    """What a monitor wrote.

    Attributes:
        rows: Its rows, in the order of their steps.
        warned: The warnings it gave.
    """

    rows: tuple[Row, ...]
    warned: tuple[Row, ...] = ()

    @property
    def first(self) -> Row:
        """The first row, of the state of things at the start."""
        return self.rows[0]

    @property
    def last(self) -> Row:
        """The last row."""
        return self.rows[-1]

    def median(self, name: str | Callable[[Row], Any], rows: Sequence[Row] | None = None) -> float | None:
        """The median of a number, by its name or by a function of a row; rows where it is unknown are left out."""
        read = name if callable(name) else lambda row: row.get(name)
        found = [value for value in map(read, self.rows if rows is None else rows) if value is not None]
        return float(median(found)) if found else None


def read_log(path: Path) -> MonitorLog:
    """The monitor's rows of a run folder or of a file.

    Raises:
        ValueError: There is nothing to read, or what is there is not the log of a monitor.
    """
    if path.is_dir():
        found = [path / name for name in LOG_NAMES if (path / name).is_file()]
        if not found:
            raise ValueError(
                f"{path} holds neither {' nor '.join(LOG_NAMES)}: give a run folder or the file of a monitor"
            )
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a run folder or the file of a monitor")
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: give a run folder or the file of a monitor") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            if number == len(lines):
                continue  # the last line of a run that was killed as it wrote
            raise ValueError(f"{path} line {number} is no JSON ({error}): give the log of a monitor") from error
        rows += [row] if isinstance(row, dict) else []
    return of_rows(rows, str(path))


def of_rows(rows: Sequence[Row], name: str = "the log") -> MonitorLog:
    """The monitor's rows among those of a log."""
    own = sorted((row for row in rows if row.get("kind") == "monitor"), key=lambda row: row["step"])
    if not own:
        raise ValueError(
            f"{name} has no rows of a monitor: watch the training with steadyvq.Monitor, or train with steadyvq train (whose "
            "monitor rests where several processes share a table by quantizer.sharded)"
        )
    probes = [row for row in rows if row.get("kind") == "probe"]
    return MonitorLog(tuple(_with_drift(own, probes)), tuple(row for row in rows if row.get("kind") == "warning"))


def _with_drift(rows: Sequence[Row], probes: Sequence[Row]) -> list[Row]:
    """Rows of our own runs get the drift of the probe images of their epoch, which is measured apart."""
    ends = [(a["step"], b) for a, b in itertools.pairwise(probes)]
    out = []
    for row in rows:
        held = [(since, probe) for since, probe in ends if since < row["step"] <= probe["step"]]
        if held and row.get("drift_per_step") is None and held[0][1].get("drift_rms") is not None:
            since, probe = held[0]
            per_step = probe["drift_rms"] / (probe["step"] - since)
            updates = max(1.0, row["alive"] / max(1.0, row["tokens_per_step"]))
            moved = {name: probe.get(name) for name in ("drift", "drift_rms", "churn")}
            steps = probe["step"] - since
            row = {
                **row,
                **moved,
                "drift_steps": steps,
                "drift_per_step": per_step,
                "drift_per_hit": per_step * updates,
            }
        out.append(row)
    return out
