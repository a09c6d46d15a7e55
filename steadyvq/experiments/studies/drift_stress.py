# SPDX-License-Identifier: Apache-2.0
"""Does encoder drift drive collapse? The encoder's learning rate times 0.1 to 10, with and without protection (Fig. 2)."""

from collections.abc import Mapping
from typing import Any

from steadyvq.experiments.claims import Claim, Decision, Results, above, below, one_each
from steadyvq.experiments.closed import (
    DATA_INIT,
    NSVQ,
    VQ,
    ahead,
    close,
    encoder_rate,
    profiles,
    rank_correlation,
    smallest_gain,
    trained,
)
from steadyvq.experiments.study import OUTCOME, ArmPlan, Measure, Study

FACTORS = (0.1, 0.5, 1.0, 5.0, 10.0)
SOURCE = "arXiv 2606.11363, Fig. 2 (read off)"
GROUPS = {"vq": [VQ], "vq, data start": [VQ, DATA_INIT], "nsvq": [NSVQ]}


def names(group: str) -> list[str]:
    """Arms of a group by rising rate."""
    return [f"{group} x{factor:g}" for factor in FACTORS]


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """Every group at every rate."""
    return {
        name: trained(settings, *changes, encoder_rate(settings, factor))
        for group, changes in GROUPS.items()
        for name, factor in zip(names(group), FACTORS, strict=True)
    }


def falls_with_drift(group: str) -> Claim:
    """Use falls from the lowest to the highest rate, and its order over rates is that of measured drift, reversed."""

    def decide(results: Results) -> Decision:
        ranks = one_each(rank_correlation(results, names(group), "mean_drift_rms", "of_ceiling"))
        return below(ranks, 0, f"rank correlation of use and RMS drift over the five rates of `{group}`")

    text = f"Without protection (`{group}`), the order of use is that of measured drift, reversed"
    return Claim(text, SOURCE, decide, "drift 0, 10, 25, 360, 980; use 94, 66, 34, 1, 0.5 %")


def loses(group: str) -> Claim:
    """Use at the lowest rate is 10 points above that at the highest."""
    first, *_, last = names(group)
    text = f"Without protection (`{group}`), use is 10 points lower at x10 than at x0.1"
    return Claim(text, SOURCE, ahead(first, last, "of_ceiling", 0.1), "94 % to 0.5 %")


def drift_grows(group: str) -> Claim:
    """Drift at the highest rate is above that at the lowest."""
    first, *_, last = names(group)
    what = f"RMS drift per epoch, `{last}` less `{first}`"
    decide = lambda r: above(r.gains(last, first, "mean_drift_rms"), 0, what)  # noqa: E731
    return Claim(f"Measured drift grows with the encoder's rate (`{group}`)", SOURCE, decide, "0 to 980; .037 to .238")


STUDY = Study(
    name="drift-stress",
    title="Encoder drift and collapse",
    question="Does use of the codebook fall as the encoder moves faster, and does protection hold it?",
    protocol=(
        "{size} The encoder's learning rate is 0.1, 0.5, 1, 5 and 10 times that of the decoder. Protection is the "
        "non-stationary loss with replacement; the control is codes placed on data, without protection. "
        "Drift is that of the latents of 32 held-out crops from one epoch to the next, mean over epochs."
    ),
    profiles=profiles(200),
    arms=arms,
    claims=(
        drift_grows("vq"),
        drift_grows("nsvq"),
        loses("vq"),
        falls_with_drift("vq"),
        loses("vq, data start"),
        falls_with_drift("vq, data start"),
        Claim(
            "With protection use stays within 10 points",
            SOURCE,
            close(names("nsvq"), "of_ceiling", 0.1),
            "94 to 97 %",
        ),
        Claim(
            "Protection keeps 10 points more in use at every rate",
            SOURCE,
            smallest_gain(names("nsvq"), names("vq"), "of_ceiling", 0.1),
            "0 to 96 points",
        ),
    ),
    measures=(
        *OUTCOME,
        Measure("mean_drift_rms", "RMS drift per epoch", ".2f"),
        Measure("mean_drift", "drift, spreads per epoch", ".2f"),
        Measure("mean_churn", "churn per epoch, %", ".0f", 100),
    ),
)
