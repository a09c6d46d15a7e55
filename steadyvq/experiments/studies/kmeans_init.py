# SPDX-License-Identifier: Apache-2.0
"""A perfect start does not last: a k-means codebook in a converged autoencoder, then straight-through training (Fig. 3)."""

from collections.abc import Mapping
from typing import Any

from steadyvq.experiments.claims import Claim
from steadyvq.experiments.closed import CONSTANT, FROZEN, NSVQ, REPLACEMENT, VQ, ahead, at_least, profiles, trained
from steadyvq.experiments.study import OUTCOME, ArmPlan, Measure, Study, Values

SOURCE = "arXiv 2606.11363, Fig. 3 (read off)"
START: Values = {"init_parts": "autoencoder", "quantizer": {"init": "kmeans"}, "optim": {"warmup_steps": 0}}
STILL: Values = {"stages": [{"name": "refine", **FROZEN}]}


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """The autoencoder, and what is trained from it with codes on the k-means centres of its latents."""
    alone = {"quantizer": {"name": "steadyvq.experiments.unquantized:unquantized"}}
    longer = {"epochs": settings["autoencoder_epochs"]}
    after = {"vq": VQ, "vq, encoder frozen": {**VQ, **STILL}, "replacement": REPLACEMENT, "nsvq": NSVQ}
    begun = {name: trained(settings, own, CONSTANT, START, start="autoencoder") for name, own in after.items()}
    return {"autoencoder": trained(settings, alone, longer, hidden=True), **begun}


EPOCHS = {"tiny": 20, "small": 40, "full": 40}
STUDY = Study(
    name="kmeans-init",
    title="A k-means start in a converged autoencoder",
    question="Does a codebook that fits perfectly at the start stay in use while the encoder trains on?",
    protocol=(
        "{size} An autoencoder is trained for {autoencoder_epochs} epochs without a quantizer; then codes are placed by "
        "k-means on its latents and everything trains on at constant rates. Control: the same with the encoder frozen."
    ),
    profiles={name: {**own, "autoencoder_epochs": EPOCHS[name]} for name, own in profiles(200).items()},
    arms=arms,
    claims=(
        Claim(
            "The k-means codebook is in use where the encoder stands still: 90 %",
            SOURCE,
            at_least("vq, encoder frozen", "of_ceiling", 0.9),
            "100 % at the start",
        ),
        Claim(
            "A moving encoder costs 10 points",
            SOURCE,
            ahead("vq, encoder frozen", "vq", "of_ceiling", 0.1),
            "100 to 85 % in 140 steps",
        ),
        Claim("The encoder moves: 0.1 spreads per epoch", SOURCE, at_least("vq", "mean_drift", 0.1), "RMS 165 to 210"),
        Claim("NS with replacement keeps 10 points more", "ours", ahead("nsvq", "vq", "of_ceiling", 0.1)),
        Claim("Replacement alone keeps 10 points more", "ours", ahead("replacement", "vq", "of_ceiling", 0.1)),
    ),
    measures=(*OUTCOME, Measure("mean_drift", "drift, spreads per epoch", ".2f")),
)
