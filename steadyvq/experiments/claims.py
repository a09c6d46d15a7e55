# SPDX-License-Identifier: Apache-2.0
"""What was claimed, and whether it was reproduced: by an interval over seeds and photographs, never by a single run.

Samples are one list per seed: a single number, or one per photograph. An interval of 95 % is the wider of two: a bootstrap that
draws seeds, then photographs within each, and Student's t over the means of the seeds, since a bootstrap of three numbers
is hardly wider than they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np

Verdict = Literal["reproduced", "not reproduced", "undecided"]
Samples = Sequence[Sequence[float]]

RESAMPLES = 2000
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Quantiles at 97.5 % for 1, 2, ... degrees of freedom; beyond, the last is used, which is a little too wide."""


@dataclass(frozen=True)
class Decision:
    """A verdict and what it rests on.

    Attributes:
        verdict: In words.
        found: What was measured, in one clause.
        estimate: The number that decides, None where several do or none could be had.
        low: Lower end of its 95 % interval.
        high: Upper end.
        seeds: How many seeds it rests on.
    """

    verdict: Verdict
    found: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0


class Missing(Exception):
    """An arm that a claim needs has no result."""


@dataclass(frozen=True)
class Results:
    """What the cells of an experiment measured: `cells[arm][seed]` is what the arm returned.

    Attributes:
        cells: By arm and seed; what failed is not there.
        arms: All arms of the plan, in their order.
    """

    cells: Mapping[str, Mapping[int, Mapping[str, Any]]]
    arms: Sequence[str] = field(default_factory=list)

    def seeds(self, *arms: str) -> list[int]:
        """Seeds with which all of these arms have a result.

        Raises:
            Missing: There are none.
        """
        found = [set(self.cells.get(arm, {})) for arm in arms]
        common = sorted(set.intersection(*found)) if found else []
        if not common:
            raise Missing(f"no seed has results of {' and '.join(arms)}")
        return common

    def values(self, arm: str, measure: str) -> list[float]:
        """A measure of an arm, one value per seed.

        Raises:
            Missing: A cell has no such number.
        """
        return [self._value(arm, seed, measure) for seed in self.seeds(arm)]

    def gains(self, better: str, worse: str, measure: str) -> list[list[float]]:
        """The first arm less the second, paired by seed and, where photographs were measured one by one, by photograph."""
        return [self._gain(better, worse, seed, measure) for seed in self.seeds(better, worse)]

    def _gain(self, better: str, worse: str, seed: int, measure: str) -> list[float]:
        first, second = (self.cells[arm][seed].get("photographs", {}).get(measure) for arm in (better, worse))
        if first and second and set(first) == set(second):
            return [first[name] - second[name] for name in sorted(first)]
        return [self._value(better, seed, measure) - self._value(worse, seed, measure)]

    def _value(self, arm: str, seed: int, measure: str) -> float:
        value = self.cells[arm][seed].get(measure)
        if value is None or not math.isfinite(value):
            raise Missing(f"{arm} with seed {seed} has no {measure}")
        return float(value)


@dataclass(frozen=True)
class Claim:
    """Something that somebody claims.

    Attributes:
        text: The claim in one sentence.
        source: Paper and table or figure, or `ours` for a guess of our own.
        decide: Results to a decision.
        published: The paper's numbers, to stand beside ours.
    """

    text: str
    source: str
    decide: Callable[[Results], Decision]
    published: str = ""

    def judge(self, results: Results) -> Decision:
        """The decision; undecided where results are missing."""
        try:
            return self.decide(results)
        except Missing as error:
            return Decision("undecided", str(error))


def interval(samples: Samples, seed: int = 0) -> tuple[float, float, float]:
    """Mean over seeds with the ends of its 95 % interval; all numbers if there is one seed only.

    Args:
        samples: One list per seed; every seed weighs the same.
        seed: Of the resampling.
    """
    means = [mean(own) for own in samples]
    middle, count = mean(means), len(means)
    if count < 2:
        return middle, -math.inf, math.inf
    low, high = np.quantile(_resampled(samples, np.random.default_rng(seed)), [0.025, 0.975])
    half = _STUDENT[min(count - 1, len(_STUDENT)) - 1] * stdev(means) / math.sqrt(count)
    return middle, min(float(low), middle - half), max(float(high), middle + half)


def _resampled(samples: Samples, rng: np.random.Generator) -> np.ndarray:
    """Means of bootstrap samples: seeds are drawn first, then for each of them anew from what it holds."""
    chosen = rng.integers(len(samples), size=(RESAMPLES, len(samples)))
    means = np.empty(chosen.shape)
    for i, own in enumerate(samples):
        rows, places = np.nonzero(chosen == i)
        drawn = rng.integers(len(own), size=(len(rows), len(own)))
        means[rows, places] = np.asarray(own)[drawn].mean(1)
    found: np.ndarray = means.mean(1)
    return found


def p_value(samples: Samples, seed: int = 0) -> float:
    """Two-sided p of a mean that would be 0: Student's t with as many degrees of freedom as there are seeds less one.

    The standard error is the larger of two: that of the means of the seeds, and a bootstrap's over photographs of their means
    over seeds.

    Args:
        samples: One list per seed; the same photographs in the same order in each, or a single number.
        seed: Of the resampling.
    """
    values = np.asarray(samples, dtype=float)
    count, photographs = values.shape
    if count < 2:
        return 1.0
    errors = [values.mean(1).std(ddof=1) / math.sqrt(count)]
    if photographs > 1:
        drawn = np.random.default_rng(seed).integers(photographs, size=(RESAMPLES, photographs))
        errors.append(values.mean(0)[drawn].mean(1).std())
    error = max(errors)
    return 1.0 if error == 0 else 2 * student_tail(abs(values.mean()) / error, count - 1)


def student_tail(t: float, freedom: int) -> float:
    """Probability that Student's t with so many degrees of freedom is above t >= 0: its density over atan(t / sqrt f)."""
    angles = np.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 4001)
    whole = np.linspace(0.0, math.pi / 2, 4001)
    tail, half = (float(np.trapezoid(np.cos(x) ** (freedom - 1), x)) for x in (angles, whole))
    return 0.5 * tail / half


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, corrected so that one wrong rejection among all has the stated probability (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def above(samples: Samples, threshold: float, what: str, form: str = ".2f", scale: float = 1.0) -> Decision:
    """Reproduced if the whole interval lies above a threshold, not if the whole lies below.

    Args:
        samples: One list per seed.
        threshold: In the samples' unit.
        what: What the numbers are, with their unit.
        form: How a number is written.
        scale: What numbers are multiplied by for that.
    """
    middle, low, high = interval(samples)
    verdict: Verdict = "reproduced" if low > threshold else "not reproduced" if high < threshold else "undecided"
    found = f"{what}: {_shown(middle, low, high, form, scale)}"
    finite = math.isfinite(low)
    return Decision(verdict, found, middle, low if finite else None, high if finite else None, len(samples))


def below(samples: Samples, threshold: float, what: str, form: str = ".2f", scale: float = 1.0) -> Decision:
    """Reproduced if the whole interval lies below a threshold, not if the whole lies above; see `above`."""
    opposite: Mapping[Verdict, Verdict] = {
        "reproduced": "not reproduced",
        "not reproduced": "reproduced",
        "undecided": "undecided",
    }
    other = above(samples, threshold, what, form, scale)
    return Decision(opposite[other.verdict], other.found, other.estimate, other.low, other.high, other.seeds)


def _shown(middle: float, low: float, high: float, form: str, scale: float) -> str:
    if not math.isfinite(low):
        return f"{middle * scale:{form}} (one seed: no interval)"
    return f"{middle * scale:{form}} [{low * scale:{form}}, {high * scale:{form}}]"


def one_each(values: Iterable[float]) -> list[list[float]]:
    """Single numbers as samples."""
    return [[value] for value in values]


def every(*decisions: Decision) -> Decision:
    """Reproduced if all are, not if any is not, undecided else."""
    verdicts = {decision.verdict for decision in decisions}
    verdict: Verdict = "undecided"
    if verdicts == {"reproduced"}:
        verdict = "reproduced"
    elif "not reproduced" in verdicts:
        verdict = "not reproduced"
    found = "; ".join(decision.found for decision in decisions)
    return Decision(verdict, found, seeds=min(decision.seeds for decision in decisions))
