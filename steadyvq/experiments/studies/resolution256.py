# SPDX-License-Identifier: Apache-2.0
"""Four times the pixels per token: does NSVQ's lead over SimVQ hold?"""

from collections.abc import Mapping
from typing import Any

from steadyvq.experiments.claims import Claim
from steadyvq.experiments.closed import EMA, NSVQ, SIMVQ, VQ, ahead, profiles, trained
from steadyvq.experiments.study import ArmPlan, Study

METHODS = {"vq": VQ, "nsvq": NSVQ, "simvq": SIMVQ, "ema": EMA}
LARGER: dict[str, Any] = {"data": {"crop_size": 64}, "model": {"channels": 32, "multipliers": [1, 2]}}
"""64x64 pixels at f8, 64 tokens; as 256x256 at f16 has the tokens of 128x128 at f8."""


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """Every method at the larger size."""
    larger = LARGER if settings["tuned"] else {}
    return {name: trained(settings, own, larger) for name, own in METHODS.items()}


STUDY = Study(
    name="resolution256",
    title="Twice the side at the same number of tokens",
    question="Does NSVQ's lead over SimVQ hold with four times the pixels per token?",
    protocol="{size} But crops of 64x64 at 8x8 pixels per token (half the width); the full profile is 256x256 at 16x16.",
    profiles=profiles(200, "nsvq_imagenet256"),
    arms=arms,
    claims=(
        Claim("NSVQ is ahead of SimVQ", "arXiv 2606.11363, text", ahead("nsvq", "simvq"), "rFID 2.89 and 3.29"),
        Claim("NSVQ is ahead of EMA with replacement", "ours", ahead("nsvq", "ema")),
        Claim("NSVQ keeps 10 points more in use than vq", "ours", ahead("nsvq", "vq", "of_ceiling", 0.1)),
    ),
)
