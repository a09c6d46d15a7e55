# SPDX-License-Identifier: Apache-2.0
"""Is VQBridge's gain its bridge, or the learning-rate schedule that came with it?"""

from collections.abc import Mapping
from typing import Any

from steadyvq.experiments.claims import Claim
from steadyvq.experiments.closed import CONSTANT, EMA, NSVQ, REPLACEMENT, SIMVQ, ahead, profiles, trained
from steadyvq.experiments.study import ArmPlan, Study, Values

FVQ: Values = {"quantizer": {"name": "fvq"}}
METHODS = {"fvq": FVQ, "plain": REPLACEMENT, "nsvq": NSVQ, "simvq": SIMVQ, "ema": EMA}
ANNEALED: Values = {"optim": {"decay": "linear", "hold": 0.37, "final": 0.01}}
"""The full rate until 37 % of the run, then linearly to 1 %, as in the paper; its warm-up is the recipe's."""


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """Every method with constant and with annealed rates."""
    schedules = {"constant": CONSTANT, "annealed": ANNEALED}
    return {
        f"{method}, {name}": trained(settings, own, schedule)
        for method, own in METHODS.items()
        for name, schedule in schedules.items()
    }


STUDY = Study(
    name="annealing",
    title="Learning annealing with and without a bridge",
    question="Does annealing help a bridge more than it helps a plain codebook?",
    protocol=(
        "{size} Constant rates, or those of FVQ: full until 37 % of the run, then linearly to 1 %. `plain` is vq with "
        "replacement. No rate of fvq was searched at this size; it has the quickstart's."
    ),
    profiles=profiles(200, "simvq_imagenet128"),
    arms=arms,
    claims=(
        Claim("Annealing improves FVQ", "arXiv 2509.10140, text", ahead("fvq, annealed", "fvq, constant")),
        Claim("It improves a plain codebook as well", "ours", ahead("plain, annealed", "plain, constant")),
        Claim("It improves NSVQ as well", "ours", ahead("nsvq, annealed", "nsvq, constant")),
        Claim(
            "With annealing in both, the bridge is ahead of a plain codebook with replacement",
            "arXiv 2509.10140 (against VQGAN)",
            ahead("fvq, annealed", "plain, annealed"),
        ),
    ),
)
