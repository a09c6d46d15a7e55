# SPDX-License-Identifier: Apache-2.0
"""Table 1 of the paper, small: ten methods on one autoencoder, with "SimVQ + NS loss + schedule"."""

from collections.abc import Mapping
from typing import Any

from steadyvq.experiments.claims import Claim
from steadyvq.experiments.closed import EMA, NSVQ, SIMVQ, SIMVQ_NS, VQ, ahead, at_least, freeze, profiles, trained
from steadyvq.experiments.study import ArmPlan, Study, Values

SOURCE = "arXiv 2606.11363, Table 1"
METHODS: Mapping[str, list[Values]] = {
    "vq": [VQ],
    "ema": [EMA],
    "vqgan_fc": [{"quantizer": {"name": "vqgan_fc", "dim": 8}, "optim": {"codebook_lr": 1e-2}}],
    "fsq": [{"quantizer": {"name": "fsq", "num_codes": 1000, "dim": 4}, "optim": {"lr": 3e-3}}],
    "lfq": [{"quantizer": {"name": "lfq", "num_codes": 1024, "dim": 10}, "optim": {"lr": 3e-3}}],
    "vqgan_lc": [{"quantizer": {"name": "vqgan_lc", "init": "kmeans"}, "optim": {"lr": 1e-2}}],
    "simvq": [SIMVQ],
    "fvq": [{"quantizer": {"name": "fvq"}, "optim": {"codebook_lr": 1e-1}}],
    "simvq + NS + freeze": [SIMVQ_NS, {"optim": {"lr": 8e-3}}, freeze()],
    "nsvq": [NSVQ, freeze()],
    "nsvq, never frozen": [NSVQ],
}
"""Rates beside those of `RATES`: the best of `steadyvq compare` (docs/evidence/compare.json)."""
PAPER_SIZES = {"vqgan_fc": {"dim": 8}, "fsq": {"num_codes": 64000, "dim": 6}, "lfq": {"num_codes": 65536, "dim": 16}}


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """The rows of the table; the full profile has the paper's sizes and one rate for all."""
    if settings["tuned"]:
        return {name: trained(settings, *own) for name, own in METHODS.items()}
    made = {}
    for name, own in METHODS.items():
        changes = [{key: value for key, value in change.items() if key != "optim"} for change in own]
        sized = {"quantizer": PAPER_SIZES[name]} if name in PAPER_SIZES else {}
        made[name] = trained(settings, *changes, sized)
    return made


STUDY = Study(
    name="table1",
    title="The methods of Table 1",
    question="Does NSVQ lead the published methods, and does NS with the schedule improve SimVQ?",
    protocol=(
        "{size} Rates of vqgan_fc, fsq, lfq, vqgan_lc and fvq are the best of `steadyvq compare` (200 steps, `val` scenes). "
        "About 10 bits per token in every row. Frozen arms: the last fifth. The paper's rFID is not measured at this size."
    ),
    profiles=profiles(400, "nsvq_imagenet128"),
    arms=arms,
    claims=(
        Claim("NSVQ is ahead of SimVQ", SOURCE, ahead("nsvq", "simvq"), "25.21 and 24.07 dB"),
        Claim("SimVQ + NS + schedule is ahead of SimVQ", SOURCE, ahead("simvq + NS + freeze", "simvq"), "24.86, 24.07"),
        Claim("NSVQ is ahead of SimVQ + NS + schedule", SOURCE, ahead("nsvq", "simvq + NS + freeze"), "25.21, 24.86"),
        Claim("NSVQ is ahead of FVQ", SOURCE, ahead("nsvq", "fvq"), "25.21 and 24.81 dB"),
        Claim("NSVQ is ahead of FSQ", SOURCE, ahead("nsvq", "fsq"), "25.21 and 23.63 dB"),
        Claim("NSVQ is ahead of VQGAN-EMA", SOURCE, ahead("nsvq", "ema"), "25.21 and 22.89 dB"),
        Claim("NSVQ is ahead of VQGAN", SOURCE, ahead("nsvq", "vq"), "25.21 and 22.20 dB"),
        Claim("NSVQ uses 90 % of its codes", SOURCE, at_least("nsvq", "of_ceiling", 0.9), "100 %"),
    ),
)
