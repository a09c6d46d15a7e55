# SPDX-License-Identifier: Apache-2.0
"""NSVQ's schedule with one piece left out at a time, under a discriminator."""

from collections.abc import Mapping, Sequence
from typing import Any

from steadyvq.experiments.claims import Claim
from steadyvq.experiments.closed import FROZEN, NS, NSVQ, REPLACEMENT, ahead, profiles, trained
from steadyvq.experiments.study import ArmPlan, Study, Values

JUDGE: Values = {
    "adversarial": {
        "discriminator": "patch",
        "options": {"channels": 16, "layers": 2, "norm": "group"},
        "weight": 0.1,
        "adaptive": False,
        "lr": 2e-4,
    }
}
"""A small discriminator; the profile `full` has the recipe's."""
JOINT = {"name": "joint", "until": {"at_fraction": 0.6}}
QUIET = {**FROZEN, "frozen": ["encoder", "discriminator"], "weights": {**FROZEN["weights"], "adversarial": 0.0}}
WARMUP = {"name": "warmup", "until": {"max_epochs": 2}, **QUIET}
REFINE = {"name": "refine", **FROZEN}
RAMPED = {**REFINE, "ramp": {"adversarial": 2}}
SOURCE = "arXiv 2606.11363, text (the numbers are not public)"

PLANS: Mapping[str, tuple[Values, Sequence[Values]]] = {
    "all phases": (NSVQ, [JOINT, WARMUP, RAMPED]),
    "no NS": (REPLACEMENT, [JOINT, WARMUP, RAMPED]),
    "no replacement": (NS, [JOINT, WARMUP, RAMPED]),
    "no freeze": (NSVQ, [{"name": "joint"}]),
    "no warm-up": (NSVQ, [JOINT, RAMPED]),
    "GAN straight after the freeze": (NSVQ, [JOINT, REFINE]),
}


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """The whole schedule and five that lack a piece."""
    judge = JUDGE if settings["tuned"] else {}
    return {
        name: trained(settings, method, judge, {"stages": list(stages)}) for name, (method, stages) in PLANS.items()
    }


def needed(piece: str, without: str, measure: str = "psnr", by: float = 0.0) -> Claim:
    """The schedule is better with a piece than without."""
    what = "keeps 10 points more in use" if measure == "of_ceiling" else "improves images"
    return Claim(f"{piece} {what}", SOURCE, ahead("all phases", without, measure, by))


STUDY = Study(
    name="phases",
    title="NSVQ's phases, left out one by one",
    question="Which piece of the schedule (joint, freeze, warm-up, return of the discriminator) is needed?",
    protocol=(
        "{size} A small PatchGAN (weight 0.1, hinge). Joint for 60 % of the run, warm-up of two epochs without discriminator, "
        "then refinement into which it returns over two epochs; each other arm lacks one piece. Cosine decay of all rates."
    ),
    profiles=profiles(400),
    arms=arms,
    claims=(
        needed("The NS loss", "no NS", "of_ceiling", 0.1),
        needed("Replacement", "no replacement", "of_ceiling", 0.1),
        needed("The NS loss", "no NS"),
        needed("The freeze", "no freeze"),
        needed("The warm-up", "no warm-up"),
        needed("Warm-up and ramp", "GAN straight after the freeze"),
    ),
)
