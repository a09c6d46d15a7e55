# SPDX-License-Identifier: Apache-2.0
"""How use and quantisation error go through the phases (Figs. 5 to 7)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steadyvq.experiments.claims import Claim, Results, above, below, one_each
from steadyvq.experiments.closed import FROZEN, NSVQ, SIMVQ, VQ, profiles, trained
from steadyvq.experiments.outcome import points, read_log
from steadyvq.experiments.study import OUTCOME, OUTCOME_CURVES, ArmPlan, Curve, Measure, Study, Values

SOURCE = "arXiv 2606.11363, Fig. 5 (read off)"
PHASES: Values = {
    "stages": [
        {"name": "joint", "until": {"at_fraction": 0.6}},
        {"name": "warmup", "until": {"max_epochs": 2}, **FROZEN},
        {"name": "refine", **FROZEN},
    ]
}


def around_freeze(run: Path) -> Values:
    """Use and error in the first evaluation, at the freeze and at the end."""
    log = read_log(run)
    stages = [row["step"] for row in log if row["kind"] == "stage"]
    at = stages[1] if len(stages) > 1 else log[-1]["step"]
    use, error = points(log, "eval", "utilization"), points(log, "probe", "relative_error")
    before = [value for step, value in error if step <= at]
    found: Values = {"first_use": use[0][1], "use_at_freeze": [value for step, value in use if step <= at][-1]}
    return {**found, "error_at_freeze": before[-1], "error_after": error[-1][1], "curves": {"relative_error": error}}


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """All phases, the same without a freeze, and the two rivals."""
    plans = {"nsvq, all phases": {**NSVQ, **PHASES}, "nsvq, joint": NSVQ, "vq": VQ, "simvq": SIMVQ}
    return {name: trained(settings, own, measure=around_freeze) for name, own in plans.items()}


def difference(results: Results, after: str, before: str) -> list[list[float]]:
    """One measure of the arm with phases less another."""
    pairs = zip(*(results.values("nsvq, all phases", name) for name in (after, before)), strict=True)
    return one_each(a - b for a, b in pairs)


STUDY = Study(
    name="dynamics",
    title="Use and error through the phases",
    question="Do all codes come into use before the freeze, and does the quantisation error fall after it?",
    protocol=(
        "{size} Joint for 60 % of the run, two epochs of warm-up, refinement; no discriminator. Cosine decay of all rates. "
        "The error is that of 32 held-out crops, as a share of the latents' spread."
    ),
    profiles=profiles(400),
    arms=arms,
    claims=(
        Claim(
            "Use rises by 20 points from the first evaluation to the freeze",
            SOURCE,
            lambda r: above(difference(r, "use_at_freeze", "first_use"), 0.2, "use, points: rise", "+.1f", 100),
            ".52 to .985",
        ),
        Claim(
            "At the freeze 90 % of the codes are in use",
            SOURCE,
            lambda r: above(one_each(r.values("nsvq, all phases", "use_at_freeze")), 0.9, "use, %", ".1f", 100),
            "98.5 %",
        ),
        Claim(
            "The quantisation error falls after the freeze",
            SOURCE,
            lambda r: below(difference(r, "error_after", "error_at_freeze"), 0, "relative error: change", "+.4f"),
            "commitment .043 to .031",
        ),
    ),
    measures=(
        *OUTCOME,
        Measure("first_use", "first use, %", ".1f", 100),
        Measure("use_at_freeze", "use at the freeze, %", ".1f", 100),
        Measure("error_at_freeze", "error at the freeze"),
        Measure("error_after", "error at the end"),
    ),
    curves=(*OUTCOME_CURVES, Curve("relative_error", "Quantisation error", "share of the spread")),
)
