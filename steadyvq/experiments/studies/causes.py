# SPDX-License-Identifier: Apache-2.0
"""What kills codes: start, the codes' rate, or the encoder's? And does use follow drift per hit over the step of a code?"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steadyvq.experiments.claims import Claim, Decision, Results, below, one_each
from steadyvq.experiments.closed import (
    DATA_INIT,
    VQ,
    ahead,
    at_least,
    encoder_rate,
    profiles,
    rank_correlation,
    trained,
)
from steadyvq.experiments.outcome import mean_of, points, read_log
from steadyvq.experiments.study import OUTCOME, ArmPlan, Measure, Study, Values
from steadyvq.training.run import RunFolder

STARTS = {"uniform start": {}, "data start": DATA_INIT}
CODES = ("slow codes", "fast codes")
FACTORS = (0.1, 1.0, 5.0)
ARMS = [f"{start}, {codes}, encoder x{factor:g}" for start in STARTS for codes in CODES for factor in FACTORS]


def code_rate(settings: Mapping[str, Any], codes: str) -> Values:
    """The codes' rate: the best of the search and a thirtieth of it; in the paper's setting the paper's and 30 times it."""
    if settings["tuned"]:
        return {"optim": {"codebook_lr": 1e-3}} if codes == "slow codes" else {}
    return {"optim": {"codebook_lr": 3e-3}} if codes == "fast codes" else {}


def speed_ratio(run: Path) -> Values:
    """How far latents move between two hits of a code, over how far a hit moves it.

    Hits: tokens of an epoch over K, as if all codes were used alike. A hit moves a code by about rate * sqrt(d) under Adam.
    """
    config = RunFolder.open(run).config
    drift = mean_of(points(read_log(run), "probe", "drift_rms"))
    side = config.data.crop_size // config.model.downsampling
    hits = config.epoch_samples * side**2 / config.quantizer.num_codes
    step = config.optim.codebook_lr * math.sqrt(config.quantizer.dim)
    return {} if drift is None else {"speed_ratio": round(drift / hits / step, 5)}


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """Start x rate of the codes x rate of the encoder."""
    return {
        f"{start}, {codes}, encoder x{factor:g}": trained(
            settings,
            VQ,
            own_start,
            code_rate(settings, codes),
            encoder_rate(settings, factor),
            measure=speed_ratio,
        )
        for start, own_start in STARTS.items()
        for codes in CODES
        for factor in FACTORS
    }


def one_curve(results: Results) -> Decision:
    """Use falls with the ratio over the arms that start from data."""
    group = [arm for arm in ARMS if arm.startswith("data")]
    ranks = rank_correlation(results, group, "speed_ratio", "of_ceiling")
    return below(one_each(ranks), -0.8, "rank correlation of use and ratio, six arms with data start")


def all_one_curve(results: Results) -> Decision:
    """Use falls with the ratio over all arms."""
    ranks = rank_correlation(results, ARMS, "speed_ratio", "of_ceiling")
    return below(one_each(ranks), -0.8, "rank correlation of use and ratio, all twelve arms")


FAST = "fast codes, encoder x5"
STUDY = Study(
    name="causes",
    title="Start, speed of the codes, speed of the encoder",
    question="Is it drift that kills codes, or where they start and how slowly they move?",
    protocol=(
        "{size} Plain codebook. Start U(-1/K, 1/K) or on data; fast codes at 3e-2, the best of the search, slow "
        "ones at 1e-3 (`full`: 3e-3 and the paper's 1e-4); encoder at 0.1, 1 and 5 times the "
        "decoder's rate. The ratio is RMS drift per epoch over hits per code and epoch (tokens / K) over rate * sqrt(d), about "
        "what Adam moves a code in a hit."
    ),
    profiles=profiles(200),
    arms=arms,
    claims=(
        Claim(
            "A sane start and rate live under a fast encoder: more than half of the codes at x5",
            "ours",
            at_least(f"data start, {FAST}", "of_ceiling", 0.5),
        ),
        Claim(
            "The tiny start is part of the collapse: 10 points at x1",
            "ours",
            ahead("data start, fast codes, encoder x1", "uniform start, fast codes, encoder x1", "of_ceiling", 0.1),
        ),
        Claim(
            "Slow codes are part of the collapse: 10 points from slow to fast at x1",
            "ours",
            ahead("data start, fast codes, encoder x1", "data start, slow codes, encoder x1", "of_ceiling", 0.1),
        ),
        Claim(
            "A fast encoder kills codes: 10 points from x0.1 to x5, data start",
            "arXiv 2606.11363, Fig. 2 (read off)",
            ahead("data start, fast codes, encoder x0.1", f"data start, {FAST}", "of_ceiling", 0.1),
            "94 to 1 %",
        ),
        Claim("Use falls with drift per hit over the step of a code, data start", "ours", one_curve),
        Claim("All arms fall on one such order, whatever the start", "ours", all_one_curve),
    ),
    measures=(
        *OUTCOME,
        Measure("mean_drift_rms", "RMS drift per epoch", ".2f"),
        Measure("speed_ratio", "drift per hit / step of a code", ".2f"),
    ),
)
