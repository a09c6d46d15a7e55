# SPDX-License-Identifier: Apache-2.0
"""When should the encoder be frozen?"""

from collections.abc import Mapping
from typing import Any

from steadyvq.experiments.claims import Claim
from steadyvq.experiments.closed import FROZEN, NSVQ, ahead, freeze, profiles, trained
from steadyvq.experiments.study import ArmPlan, Study

FRACTIONS = (0.2, 0.4, 0.6, 0.8)


def plateau(armed: int, patience: int = 3) -> dict[str, Any]:
    """The paper's rule: freeze when the commitment loss has not fallen for some epochs, armed after some."""
    until = {"plateau": "commitment", "patience": patience, "min_epochs": armed}
    return {"stages": [{"name": "joint", "until": until}, {"name": "refine", **FROZEN}]}


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """Fixed fractions of the run, the rule with and without arming, never."""
    fixed: dict[str, ArmPlan] = {f"at {at:.0%}": trained(settings, NSVQ, freeze(at)) for at in FRACTIONS}
    rules = {"plateau": trained(settings, NSVQ, plateau(0)), "plateau, armed": trained(settings, NSVQ, plateau(5))}
    return {**fixed, **rules, "never": trained(settings, NSVQ)}


STUDY = Study(
    name="freeze-time",
    title="When to freeze the encoder",
    question="Does the paper's plateau rule find a good moment, and is any moment better than none?",
    protocol=(
        "{size} NSVQ, frozen at fixed fractions of the run, by the plateau of the commitment loss (three epochs of 20 steps "
        "here, ten whole epochs in the paper) from the beginning or armed after five epochs, or "
        "never. Cosine decay of all rates."
    ),
    profiles=profiles(400),
    arms=arms,
    claims=(
        Claim("The plateau rule is better than no freeze", "arXiv 2606.11363, text", ahead("plateau", "never")),
        Claim("Arming the rule improves it", "ours", ahead("plateau, armed", "plateau")),
        Claim("A late freeze is better than an early one", "ours", ahead("at 80%", "at 20%")),
        Claim("A late freeze is better than none", "ours", ahead("at 80%", "never")),
    ),
)
