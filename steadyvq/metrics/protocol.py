# SPDX-License-Identifier: Apache-2.0
"""Which evaluations may be compared: the conditions of a measurement, their identity, and refusal where they differ."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from steadyvq.metrics.record import EvaluationRecord

RANGE, ROUNDING = "[-1, 1], clamped", "8 bits, to nearest"
INTERVAL = "95 % over photographs: 2000 bootstraps of means, jackknife of kernel distances"
WEIGHTS = "_weights"
"""End of the names of metrics that are hashes of networks."""


def conditions(crop: int, count: int, reference: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides whether numbers may be compared.

    Args:
        crop: Side of the images in pixels.
        count: Number of images.
        reference: SHA-256 of the pixels of the originals.
        metrics: Those of the evaluation; the hashes of networks are taken from there.
    """
    return {
        "crop": crop,
        "count": count,
        "reference": reference,
        "range": RANGE,
        "rounding": ROUNDING,
        "interval": INTERVAL,
        "networks": {n.removesuffix(WEIGHTS): v for n, v in sorted(metrics.items()) if n.endswith(WEIGHTS)},
    }


def protocol_id(found: Mapping[str, Any]) -> str:
    """The first 16 digits of the SHA-256 of the conditions: equal where all of them are."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What two sets of conditions disagree on, in words; of the networks, those that both have."""
    said = [
        f"{name} ({_short(first[name])} and {_short(second[name])})"
        for name in first
        if name != "networks" and name in second and first[name] != second[name]
    ]
    one, other = first["networks"], second["networks"]
    unlike = [name for name in one if name in other and one[name] != other[name]]
    return said + [f"the network of {name} ({_short(one[name])} and {_short(other[name])})" for name in unlike]


def compare_records(first: EvaluationRecord, second: EvaluationRecord) -> dict[str, tuple[float, float]]:
    """The numbers that two evaluations have in common.

    Returns:
        Metric to (first, second), for all metrics that are numbers in both.

    Raises:
        ValueError: They were measured under different conditions; it names what differs.
    """
    refuse_unlike(of_record(first), of_record(second))
    return {
        name: (float(value), float(second.metrics[name]))
        for name, value in first.metrics.items()
        if _is_number(value) and _is_number(second.metrics.get(name))
    }


def refuse_unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raises ValueError unless two sets of conditions agree."""
    unlike = differences(first, second)
    if unlike:
        verb = "differs" if len(unlike) == 1 else "differ"
        raise ValueError(f"these evaluations may not be compared: {', '.join(unlike)} {verb}; measure both alike")


def of_record(record: EvaluationRecord) -> dict[str, Any]:
    """The conditions of a record; those of an older one, which names none, from what it has."""
    if record.conditions:
        return record.conditions
    return conditions(record.crop, record.count, record.pixels_hash, record.metrics)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:8]}..." if len(text) == 64 else text
