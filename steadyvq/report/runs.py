# SPDX-License-Identifier: Apache-2.0
"""Run folders as a report reads them: whatever is there, and nothing that must be.

A run may still be going on, or have been killed in the middle of a line; every file but `log.jsonl` may be missing.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
Point = tuple[float, float | None]
"""A step and a value; None breaks the curve, because the row was logged without the value."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        path: the folder.
        label: a name that is unique among the runs of one report.
        rows: the readable rows of `log.jsonl`, in the order of the file.
        info: `run.json`, or empty.
        records: the evaluation records by step; the metrics and the name of the file (`file`) stand beside the rest.
        counts: hits of each code on the held-out images, or None.
        idle: hits that each code has missed since its last one, had all been used alike, or None.
        patience: how many of these a code may miss before it counts as dead, or None.
        config: the resolved configuration as text, or None.
        settings: the same as plain values, or empty where it cannot be read.
        pictures: step and file of each picture, oldest first.
        code_map: the picture of the tokens, or None.
        best: `checkpoints/best.json`, or empty.
    """

    path: Path
    label: str
    rows: list[Row]
    info: dict[str, Any]
    records: list[dict[str, Any]]
    counts: list[int] | None
    idle: list[float] | None
    patience: float | None
    config: str | None
    settings: dict[str, Any]
    pictures: list[tuple[str, Path]]
    code_map: Path | None
    best: dict[str, Any]

    @property
    def is_prior(self) -> bool:
        """Whether what was trained draws pictures, rather than reconstructing them."""
        return bool(self.settings.get("task", "tokenizer") != "tokenizer")

    def points(self, kind: str, key: str) -> list[Point]:
        """Return one point per row of a kind, with None where the row has no finite value of the key."""
        rows = [row for row in self.rows if row.get("kind") == kind and number(row.get("step")) is not None]
        return [(float(row["step"]), number(row.get(key))) for row in rows]

    def has(self, kind: str, key: str) -> bool:
        """Return whether any row of this kind has a finite value of the key."""
        return any(value is not None for _, value in self.points(kind, key))

    def keys(self, kind: str) -> list[str]:
        """Return the keys with a finite value in any row of this kind, in order of first appearance."""
        seen = dict.fromkeys(key for row in self.rows if row.get("kind") == kind for key in row)
        return [key for key in seen if key not in ("step", "epoch", "seconds") and self.has(kind, key)]

    def stages(self) -> list[Row]:
        """Return the rows that say where a stage began, in order."""
        rows = [row for row in self.rows if row.get("kind") == "stage" and number(row.get("step")) is not None]
        return sorted(rows, key=lambda row: float(row["step"]))

    def final(self, key: str) -> float | None:
        """Return the last evaluation's value of a key, from the log or else from the newest record."""
        evaluations = [row for row in self.rows if row.get("kind") == "eval"] or self.final_records
        return number(evaluations[-1].get(key)) if evaluations else None

    @property
    def final_records(self) -> list[dict[str, Any]]:
        """The newest record that training wrote, or else the newest of all, as a list of one; empty without records."""
        trained = [record for record in self.records if by_training(record)]
        return (trained or self.records)[-1:]

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps of an epoch, from the rows that training writes at the end of one."""
        ends = [row for row in self.rows if row.get("kind") in ("probe", "eval")]
        for row in reversed(ends):
            step, epoch = number(row.get("step")), number(row.get("epoch"))
            if step and epoch is not None and epoch >= 0:
                return step / (epoch + 1)
        return None

    @property
    def num_codes(self) -> int | None:
        """K, the size of the codebook, if any file tells it."""
        logged = self.final("num_codes")
        if logged is None:
            return len(self.counts) if self.counts else None
        return int(logged)

    @property
    def active(self) -> int | None:
        """Codes hit at least once in the last evaluation."""
        logged, utilization = self.final("active"), self.final("utilization")
        if logged is not None:
            return int(logged)
        if utilization is None or self.num_codes is None:
            return None
        return round(utilization * self.num_codes)

    @property
    def seconds(self) -> float | None:
        """How long the run has trained."""
        logged = [number(row.get("seconds")) for row in self.rows]
        known = [value for value in (number(self.info.get("seconds")), *logged) if value is not None]
        return max(known, default=None)

    @property
    def last_step(self) -> int:
        """The newest step that the log knows."""
        steps = [number(row.get("step")) for row in self.rows]
        return int(max((step for step in steps if step is not None), default=0))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders and give each a label of its own: its title, with the folder's name where titles repeat.

    Raises:
        ValueError: there are no folders, or one of them holds no log.
    """
    if not folders:
        raise ValueError("no run folders given: name at least one folder written by steadyvq train.")
    folders = [Path(folder) for folder in folders]
    for folder in folders:
        if not (folder / "log.jsonl").is_file():
            raise ValueError(f"{folder} holds no log.jsonl: give a folder written by steadyvq train.")
    infos = [_read_json(folder / "run.json") for folder in folders]
    return [_read_run(*parts) for parts in zip(folders, infos, _labels(folders, infos), strict=True)]


def number(value: object) -> float | None:
    """Return a finite number as a float, and None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None


def by_training(record: dict[str, Any]) -> bool:
    """Return whether training wrote the record, and not an evaluation on its own, whatever that measured."""
    return str(record["file"]).startswith("step-")


def _labels(folders: Sequence[Path], infos: Sequence[dict[str, Any]]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    titles = [str(info.get("title") or name) for info, name in zip(infos, names, strict=True)]
    by_folder = [t if titles.count(t) == 1 else f"{t} ({n})" for t, n in zip(titles, names, strict=True)]
    return [label if by_folder.count(label) == 1 else f"{label} #{i + 1}" for i, label in enumerate(by_folder)]


def _read_run(folder: Path, info: dict[str, Any], label: str) -> Run:
    config, usage, code_map = folder / "config.yaml", _read_json(folder / "usage.json"), folder / "codes.png"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None
    counts = _amounts(usage.get("counts"))
    return Run(
        path=folder,
        label=label,
        rows=_read_rows(folder / "log.jsonl"),
        info=info,
        records=_read_records(folder / "evaluations"),
        counts=None if counts is None else [int(count) for count in counts],
        idle=_amounts(usage.get("idle")),
        patience=number(usage.get("patience")),
        config=text,
        settings=_read_settings(text or ""),
        pictures=[(_step_of(path), path) for path in sorted((folder / "pictures").glob("*.png"))],
        code_map=code_map if code_map.is_file() else None,
        best=_read_json(folder / "checkpoints" / "best.json"),
    )


def _read_rows(path: Path) -> list[Row]:
    """Skip lines that are not whole: the last one of a killed run."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_records(folder: Path) -> list[dict[str, Any]]:
    read = ((path, _read_json(path)) for path in sorted(folder.glob("*.json")))
    records = [_flat(record) | {"file": path.name} for path, record in read if record]
    return sorted(records, key=lambda record: number(record.get("step")) or 0.0)


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    metrics = record.get("metrics")
    return {**record, **metrics} if isinstance(metrics, dict) else record


def _read_settings(text: str) -> dict[str, Any]:
    try:
        # By way of JSON: values that no configuration has become text, and one that holds itself is refused.
        content = json.loads(json.dumps(yaml.safe_load(text), default=str))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _amounts(values: object) -> list[float] | None:
    """Return a list of numbers from zero on, one per code, or None if it is anything else."""
    if not isinstance(values, list) or not values:
        return None
    known = [amount for value in values if (amount := number(value)) is not None and amount >= 0]
    return known if len(known) == len(values) else None


def _step_of(path: Path) -> str:
    digits = path.stem.rpartition("-")[2]
    return f"step {int(digits):,}" if digits.isdecimal() else path.stem
