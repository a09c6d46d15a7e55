# SPDX-License-Identifier: Apache-2.0
"""Is the freeze more than a learning rate that falls? For NSVQ, SimVQ and EMA."""

from collections.abc import Mapping
from typing import Any

from steadyvq.experiments.claims import Claim
from steadyvq.experiments.closed import CONSTANT, EMA, NSVQ, SIMVQ, ahead, freeze, profiles, trained
from steadyvq.experiments.study import ArmPlan, Study

METHODS = {"nsvq": NSVQ, "simvq": SIMVQ, "ema": EMA}
SCHEDULES: Mapping[str, list[dict[str, Any]]] = {
    "nothing": [CONSTANT, {"optim": {"ema_decay": 0.0}}],
    "average": [CONSTANT],
    "freeze": [CONSTANT, freeze()],
    "encoder to 0": [CONSTANT, {"optim": {"encoder_decay": "cosine"}}],
    "all to 0": [],
}
"""What ends a run: nothing at all; averaged weights alone; and with these, a freeze or rates that fall by cosine."""


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """Every method with every schedule; `full` recipes have constant rates, so the fall is said."""
    falls = {"optim": {"decay": "cosine"}}
    return {
        f"{method}, {schedule}": trained(settings, own, *(changes or [falls]))
        for method, own in METHODS.items()
        for schedule, changes in SCHEDULES.items()
    }


def claims_of(method: str) -> list[Claim]:
    """The freeze against what could be had without it."""
    paper = "arXiv 2606.11363, text"
    return [
        Claim(f"The freeze improves `{method}`", paper, ahead(f"{method}, freeze", f"{method}, average")),
        Claim(
            f"It does more for `{method}` than the encoder's rate falling to 0",
            "ours",
            ahead(f"{method}, freeze", f"{method}, encoder to 0"),
        ),
        Claim(
            f"It does more for `{method}` than all rates falling to 0",
            "ours",
            ahead(f"{method}, freeze", f"{method}, all to 0"),
        ),
    ]


STUDY = Study(
    name="freeze-controls",
    title="The freeze and its controls",
    question="Is the gain by freezing the encoder more than that of a falling learning rate, or of averaged weights?",
    protocol=(
        "{size} Constant rates after a warm-up, but where they fall to 0 along a cosine. The freeze holds the encoder still "
        "for the last fifth. Averaged weights (0.99) are judged in every arm but `nothing`. Rates were searched with all "
        "falling, which favours `all to 0`."
    ),
    profiles=profiles(400),
    arms=arms,
    claims=tuple(claim for method in METHODS for claim in claims_of(method)),
)
