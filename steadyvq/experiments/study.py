# SPDX-License-Identifier: Apache-2.0
"""What an experiment is: claims, arms, measures. Adding one is adding a file to `studies/` that defines `STUDY`.

An arm is a training run by configuration (`Trained`), or a function that computes something in seconds (`Computed`). Either may
need the results of other arms with the same seed; the runner sees to the order.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from steadyvq.experiments.claims import Claim, Results
from steadyvq.quantizers.names import look_up

Values = dict[str, Any]
PROFILES = ("tiny", "small", "full")


@dataclass(frozen=True)
class Cell:
    """One arm with one seed, as a function of a `Computed` arm gets it.

    Attributes:
        settings: Of the arm, plain data.
        seed: All randomness comes from it.
        folder: Where files may be left.
        inputs: The folders of the arms that were asked for in `needs`, by name.
    """

    settings: Mapping[str, Any]
    seed: int
    folder: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Computed:
    """An arm that is a function.

    Attributes:
        run: Function at the top level of a module: cell to measures. Names are those of `Study.measures`; `curves` may hold
            lists of [step, value] by name, at most a few dozen points each.
        settings: Plain data; the cell is computed anew where they change.
        needs: Arms whose folders it reads.
        hidden: It only prepares something for others and is in no table.
        steps: How long it takes, in units that all arms of the study share (for the time left).
    """

    run: Callable[[Cell], Values]
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: Sequence[str] = ()
    hidden: bool = False
    steps: int = 1


@dataclass(frozen=True)
class Trained:
    """An arm that is a training run, measured on held-out photographs when it is done (`outcome.py`).

    Attributes:
        recipe: Name of a recipe.
        settings: What differs from it; the seed is set by the runner.
        start: An arm whose tokenizer it starts from; `settings` may say `init_parts`.
        measure: Function at the top level of a module: run folder to further measures.
        hidden: It only prepares something for others and is in no table.
    """

    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    measure: Callable[[Path], Values] | None = None
    hidden: bool = False

    @property
    def needs(self) -> Sequence[str]:
        """Arms that must be done before."""
        return () if self.start is None else (self.start,)


ArmPlan = Computed | Trained


@dataclass(frozen=True)
class Measure:
    """A column of the table.

    Attributes:
        name: Key of what a cell returned.
        label: Head of the column, with the unit.
        form: Format of a number.
        scale: What the number is multiplied by.
    """

    name: str
    label: str
    form: str = ".3f"
    scale: float = 1.0


OUTCOME = (
    Measure("of_ceiling", "codes used, % of ceiling", ".1f", 100),
    Measure("perplexity", "perplexity", ".0f"),
    Measure("psnr", "PSNR, dB", ".2f"),
    Measure("relative_error", "relative error"),
    Measure("steps_to_95", "steps to 95 % of final use", ".0f"),
)
"""Columns of every study whose arms are training runs."""


@dataclass(frozen=True)
class Curve:
    """A chart: one curve per arm, mean over seeds, shaded from the smallest to the largest."""

    name: str
    title: str
    unit: str = ""
    percent: bool = False


OUTCOME_CURVES = (
    Curve("utilization", "Codes used, held out", "share of all codes", percent=True),
    Curve("psnr", "PSNR, held out", "dB"),
    Curve("drift", "Encoder drift", "spreads per epoch"),
    Curve("churn", "Churn", "share of tokens changed per epoch", percent=True),
)


@dataclass(frozen=True)
class Study:
    """An experiment.

    Attributes:
        name: What `steadyvq experiment` takes, the file's name with hyphens.
        title: In a few words.
        question: What it answers, in one sentence.
        protocol: How, in a few sentences; `{}` fields are filled with the settings of the profile.
        profiles: Settings by profile, plain data.
        arms: Settings of a profile to the arms by name, in the order of the table.
        claims: What is decided.
        measures: Columns of the table.
        curves: Charts.
        seeds: Default number of seeds.
        draw: Makes pictures: (folder for them, folders of the cells by arm and seed, results) to files, which the page shows.
        check: Called before anything is run; raises ValueError where what all arms need is missing.
    """

    name: str
    title: str
    question: str
    protocol: str
    profiles: Mapping[str, Mapping[str, Any]]
    arms: Callable[[Mapping[str, Any]], Mapping[str, ArmPlan]]
    claims: Sequence[Claim]
    measures: Sequence[Measure] = OUTCOME
    curves: Sequence[Curve] = OUTCOME_CURVES
    seeds: int = 3
    draw: Callable[[Path, Mapping[tuple[str, int], Path], Results], Sequence[Path]] | None = None
    check: Callable[[], None] | None = None

    def settings(self, profile: str) -> Mapping[str, Any]:
        """Settings of a profile.

        Raises:
            ValueError: There is no such profile.
        """
        found: Mapping[str, Any] = look_up(f"profile of {self.name}", profile, self.profiles)
        return found

    def judge(self, results: Results) -> list[dict[str, Any]]:
        """Every claim with its decision, as plain data."""
        return [
            {
                "claim": claim.text,
                "source": claim.source,
                "published": claim.published,
                **claim.judge(results).__dict__,
            }
            for claim in self.claims
        ]


@cache
def studies() -> dict[str, Study]:
    """All experiments by name, sorted."""
    package = importlib.import_module("steadyvq.experiments.studies")
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        study = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "STUDY", None)
        if isinstance(study, Study):
            found[study.name] = study
    return dict(sorted(found.items()))


def study_of(name: str) -> Study:
    """The experiment of that name.

    Raises:
        ValueError: There is none; the message lists the known ones.
    """
    found: Study = look_up("experiment", name, studies())
    return found
