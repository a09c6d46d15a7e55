# SPDX-License-Identifier: Apache-2.0
"""Who keeps a large codebook in use?"""

from collections.abc import Mapping
from typing import Any

from steadyvq.experiments.claims import Claim
from steadyvq.experiments.closed import EMA, NSVQ, SIMVQ, VQ, ahead, close, profiles, trained
from steadyvq.experiments.study import ArmPlan, Study

METHODS = {"vq": VQ, "nsvq": NSVQ, "simvq": SIMVQ, "ema": EMA}
SIZES = {
    "tiny": {"codes": [256, 1024, 4096, 16384], "dim": 32},
    "small": {"codes": [1024, 4096, 16384], "dim": 64},
    "full": {"codes": [1024, 4096, 16384, 65536, 262144], "dim": 256},
}


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """Every method at every size."""
    return {
        f"{method}, K {codes}": trained(settings, own, {"quantizer": {"num_codes": codes, "dim": settings["dim"]}})
        for codes in settings["codes"]
        for method, own in METHODS.items()
    }


def sizes(method: str) -> list[str]:
    """Arms of a method that every profile has."""
    return [f"{method}, K {codes}" for codes in (1024, 4096)]


STUDY = Study(
    name="codebook-scale",
    title="Codebooks from small to large",
    question="Does use hold, and does quality grow, as the codebook grows?",
    protocol=(
        "{size} But for K, which is {codes}, and d = {dim}. Use is in percent of what a uniform source would reach on "
        "the judged tokens. Rates are those of K = 1,024 at every size."
    ),
    profiles={name: {**own, **SIZES[name]} for name, own in profiles(200, "nsvq_imagenet128").items()},
    arms=arms,
    claims=(
        Claim("NSVQ's use holds from K = 1,024 to 4,096: 10 points", "ours", close(sizes("nsvq"), "of_ceiling", 0.1)),
        Claim("SimVQ's use holds likewise", "arXiv 2411.02038", close(sizes("simvq"), "of_ceiling", 0.1), "100 %"),
        Claim("NSVQ gains by four times the codes", "ours", ahead("nsvq, K 4096", "nsvq, K 1024")),
        Claim(
            "SimVQ gains by four times the codes",
            "arXiv 2411.02038 (K = 1,024 and 8,192)",
            ahead("simvq, K 4096", "simvq, K 1024"),
            "rFID 3.67 and 2.98",
        ),
        Claim("Plain codebooks gain nothing", "ours", ahead("vq, K 1024", "vq, K 4096", by=-0.2)),
        Claim("At K = 4,096 NSVQ is ahead of EMA", "ours", ahead("nsvq, K 4096", "ema, K 4096")),
    ),
)
