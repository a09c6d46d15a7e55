# SPDX-License-Identifier: Apache-2.0
"""Evaluation records: numbers that never travel without what they were measured on."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from steadyvq.files import write_text


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation of one checkpoint.

    Attributes:
        metrics: Name to value; values are numbers, None, strings, or nested dicts and lists of these.
        data: The photographs' source, as in ``Collection.data``.
        split: The split, as in ``Collection.split_label``.
        crop: Side of the evaluated images in pixels.
        count: Number of images.
        photographs: Number of photographs they were cut from.
        tokens: Number of tokens.
        pixels_hash: SHA-256 of the evaluated pixels.
        config_hash: Hash of the configuration the checkpoint was trained with.
        step: Optimiser step of the checkpoint.
        version: Version of the code that evaluated.
        protocol: How the numbers were computed, in one sentence.
        conditions: All that decides whether the numbers may be compared (`steadyvq.metrics.conditions`); empty in records of
            versions that did not write them.
        protocol_id: A short hash of the conditions.
    """

    metrics: dict[str, Any]
    data: str
    split: str
    crop: int
    count: int
    photographs: int
    tokens: int
    pixels_hash: str
    config_hash: str
    step: int
    version: str
    protocol: str
    conditions: dict[str, Any] = field(default_factory=dict)
    protocol_id: str = ""


def write_record(path: str | Path, record: EvaluationRecord) -> None:
    """Write a record as JSON, atomically: a reader sees the old file or the whole new one.

    Infinite and undefined numbers, which JSON does not have, become the strings "inf", "-inf" and "nan".
    """
    path = Path(path)
    text = json.dumps(_plain(asdict(record)), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def read_record(path: str | Path) -> EvaluationRecord:
    """Read what ``write_record`` wrote.

    Raises:
        ValueError: The file is no evaluation record.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): give a file that write_record wrote") from error
    known = {entry.name for entry in fields(EvaluationRecord)}
    # Records of versions that did not write the fields with defaults are still records.
    needed = {entry.name for entry in fields(EvaluationRecord) if entry.default_factory is entry.default is MISSING}
    if not isinstance(content, dict) or not needed <= set(content) <= known:
        given = set(content) if isinstance(content, dict) else set()
        different = sorted((needed - given) | (given - known))
        raise ValueError(
            f"{str(path)!r} is not an evaluation record (missing or unknown: {', '.join(different)}): "
            "give a file that write_record wrote"
        )
    return EvaluationRecord(**{**content, "metrics": _numbers(content["metrics"])})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return float(value) if value in ("inf", "-inf", "nan") else value
