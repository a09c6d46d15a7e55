# SPDX-License-Identifier: Apache-2.0
"""The screen for ideas: latents of a real run, replayed to any quantizer in seconds."""

from collections.abc import Callable, Mapping
from statistics import mean
from typing import Any

import torch

from steadyvq.experiments.claims import Claim, Decision, Missing, Results, above, below, one_each
from steadyvq.experiments.latents import SIZES, Dump, as_tensor, source
from steadyvq.experiments.study import Cell, Computed, Curve, Measure, Study, Values
from steadyvq.experiments.tracking import Candidate, Follower, decibels, distortion, distortion_of, used

LAGS = 3
FIRST = 8
"""Batches that codes are placed on."""
NOTES = "ours"
KMEANS_EMA = {"quantizer": "ema", "init": "kmeans"}
NO_REPLACEMENT = {"maintenance": {"replace": None}}


def replay(cell: Cell) -> Values:
    """Use, lag and regret over k-means of one candidate on the latents of one run."""
    dump, s = Dump.open(cell.inputs["source"]), cell.settings
    steps, _, dim = dump.stream.shape
    follower = Follower(Candidate(**s["candidate"]), s["codes"], dim, steps, cell.seed)
    use, regret, lags = [], [], list[float]()
    churned, before = list[float](), None
    # A batch may hold fewer latents than there are codes.
    follower.begin(torch.cat([dump.batch(step) for step in range(min(FIRST, steps))]))
    for step in range(steps):
        follower.step(dump.batch(step))
        if step + 1 in dump.looks:
            look = dump.looks.index(step + 1)
            if look:
                follower.transport(as_tensor(dump.probe[look - 1]), as_tensor(dump.probe[look]))
            if step + 1 == steps:
                follower.polish(as_tensor(dump.probe[look]))
            judge = as_tensor(dump.judge[look])
            made, indices = follower.quantise(judge)
            use.append([step + 1, round(used(indices, s["codes"]), 4)])
            regret.append([step + 1, round(decibels(distortion(judge, made), dump.best[look]), 3)])
            lags.append(_lag(follower, dump, look))
            churned += [] if before is None else [float((indices != before).float().mean())]
            before = indices
    half = len(use) // 2
    return {
        "use": use[-1][1],
        "regret": round(mean(value for _, value in regret[half:]), 3),
        "final": regret[-1][1],
        "lag": round(mean(lags[half:]), 2),
        "churn": round(mean(churned), 4),
        "steps_to_95": next((at for at, value in use if value >= 0.95 * use[-1][1]), None),
        "curves": {"use": use, "regret": regret},
    }


def _lag(follower: Follower, dump: Dump, look: int) -> float:
    """How many steps ago the latents were that the codes fit best, compared with what k-means achieves on each."""
    codes = follower.codes()
    if codes.shape[1] != dump.judge.shape[2]:
        return 0.0
    excess = {}
    for back in range(min(LAGS, look) + 1):
        latents = as_tensor(dump.judge[look - back][:2048])
        excess[back] = distortion_of(latents, codes) / distortion_of(
            latents, torch.from_numpy(dump.kmeans[look - back].copy())
        )
    back = min(excess, key=excess.__getitem__)
    return float(dump.looks[look] - dump.looks[look - back])


def candidates() -> dict[str, dict[str, Any]]:
    """Published methods at several rates, and the candidates for a default."""
    found: dict[str, dict[str, Any]] = {}
    for rate in (1e-3, 1e-2, 1e-1):
        found[f"vq lr {rate:g}"] = {"quantizer": "vq", "rate": rate}
    for rate in (1e-2, 1e-1):
        found[f"vq on data lr {rate:g}"] = {"quantizer": "vq", "rate": rate, "init": "data"}
        found[f"ns alone lr {rate:g}"] = {"quantizer": "nsvq", "rate": rate, "options": NO_REPLACEMENT}
        found[f"replacement alone lr {rate:g}"] = {
            "quantizer": "vq",
            "rate": rate,
            "options": {"maintenance": {"replace": {}}},
        }
        found[f"nsvq lr {rate:g}"] = {"quantizer": "nsvq", "rate": rate}
    found["nsvq, ns for 30 %"] = {"quantizer": "nsvq", "rate": 1e-2, "ns_until": 0.3}
    found["nsvq, calibrated"] = {
        "quantizer": "nsvq",
        "rate": 1e-2,
        "options": {"temperature": {"effective_losers": 16.0}},
    }
    found["nsvq, per code"] = {"quantizer": "nsvq", "rate": 1e-2, "options": {"losses": {"ns": {"per_code": True}}}}
    for rate in (1e-2, 3e-2):
        found[f"simvq lr {rate:g}"] = {"quantizer": "simvq", "rate": rate}
    found["simvq + ns"] = {"quantizer": "simvq", "rate": 1e-2, "options": {"losses": {"ns": 0.1}}}
    found["simvq + trained base"] = {"quantizer": "simvq", "rate": 1e-2, "options": {"train_base": True}}
    for decay in (0.8, 0.95):
        found[f"ema {decay}"] = {**KMEANS_EMA, "options": {"maintenance": {"ema": {"decay": decay}}}}
    for patience, donors in ((7, "distortion"), (30, "distortion"), (30, "usage")):
        replace = {"patience": float(patience), "donors": donors}
        options = {"maintenance": {"ema": {"decay": 0.95}, "replace": replace}}
        found[f"ema + replacement {patience} {donors}"] = {**KMEANS_EMA, "options": options}
    usual = {**KMEANS_EMA, "options": {"maintenance": {"ema": {"decay": 0.95}, "replace": {}}}}
    found["ema + replacement, centred"] = {**usual, "normalise": "center"}
    found["ema + replacement, scaled"] = {**usual, "normalise": "scale"}
    found["ema + replacement, transported"] = {**usual, "transport": "idle"}
    found["ema + replacement, polished"] = {**usual, "polish": 10}
    found["oracle"] = {"quantizer": "steadyvq.experiments.oracle:oracle", "init": "kmeans"}
    return found


def arms(settings: Mapping[str, Any]) -> dict[str, Computed]:
    """The run whose latents are replayed, and every candidate."""
    made = {"source": source(settings)}
    for name, candidate in candidates().items():
        own = {"candidate": candidate, "codes": settings["codes"]}
        made[name] = Computed(replay, own, needs=["source"])
    return made


Decide = Callable[[Results], Decision]


def best(results: Results, prefix: str) -> str:
    """The rate of a method with the least regret, mean over seeds."""
    tried = [arm for arm in results.cells if arm.startswith(f"{prefix} lr ")]
    if not tried:
        raise Missing(f"no rate of {prefix} has a result")
    return min(tried, key=lambda arm: mean(results.values(arm, "regret")))


def at_best(prefix: str, than: str, measure: str = "regret") -> Decide:
    """The same at the best rate of each; a name that is no prefix stands for itself."""

    def decide(results: Results) -> Decision:
        pair = [name if name in results.cells else best(results, name) for name in (prefix, than)]
        return better(pair[0], pair[1], measure)(results)

    return decide


def better(arm: str, than: str, measure: str = "regret") -> Decide:
    """Whether the first has less regret than the second."""

    def decide(results: Results) -> Decision:
        gains = [[-value for value in pair] for pair in results.gains(arm, than, measure)]
        return above(gains, 0, f"dB less regret than `{than}`", "+.2f")

    return decide


def _linear(results: Results) -> Decision:
    return above(
        one_each(results.values("source", "affine_r2")), 0.7, "R² of an affine map over the steps between looks"
    )


def _near_oracle(results: Results) -> Decision:
    return below(results.gains(best(results, "simvq"), "oracle", "regret"), 0.1, "dB more regret", "+.2f")


def _dies(results: Results) -> Decision:
    return below(one_each(results.values("vq lr 0.001", "use")), 0.5, "codes used, %", ".0f", 100)


def _alive(results: Results) -> Decision:
    return above(results.gains("ns alone lr 0.01", "vq lr 0.01", "use"), 0, "points of use", "+.0f", 100)


NSVQ_PAPER = "arXiv 2606.11363"
BEST = "ema + replacement 30 distortion"
CLAIMS = (
    Claim(
        "Plain VQ at a small rate collapses (fewer than half of the codes)", NSVQ_PAPER, _dies, "34 % (Fig. 2, lr x 1)"
    ),
    Claim(
        "NS alone uses more codes than plain VQ at its rate", NSVQ_PAPER, _alive, "94-97 % with replacement (Fig. 2)"
    ),
    Claim("NS alone has less regret than plain VQ, each at its best rate", NSVQ_PAPER, at_best("ns alone", "vq")),
    Claim("NS adds to replacement, each at its best rate", NSVQ_PAPER, at_best("nsvq", "replacement alone")),
    Claim("NSVQ has less regret than SimVQ, each at its best rate", NSVQ_PAPER, at_best("nsvq", "simvq")),
    Claim("EMA with patient replacement has less regret than NSVQ at its best rate", NOTES, at_best(BEST, "nsvq")),
    Claim("Patience of 30 expected hits beats 7", NOTES, better(BEST, "ema + replacement 7 distortion")),
    Claim("Donors by distortion beat donors by use", NOTES, better(BEST, "ema + replacement 30 usage")),
    Claim("NS early only beats NS always", NOTES, better("nsvq, ns for 30 %", "nsvq lr 0.01", "final")),
    Claim("Most drift is affine (R² above 0.7)", NOTES, _linear),
    Claim("Moving idle codes by the probe's affine map helps", NOTES, better("ema + replacement, transported", BEST)),
    Claim("Centring helps", NOTES, better("ema + replacement, centred", BEST)),
    Claim("Ten passes of k-means at the end help", NOTES, better("ema + replacement, polished", BEST, "final")),
    Claim("SimVQ at its best rate is within 0.1 dB of the oracle", NOTES, _near_oracle),
)

STUDY = Study(
    name="replay",
    title="Latents of a real run, replayed",
    question="Which codebook follows the latents of a real encoder, at what use, lag and regret over k-means?",
    protocol=(
        "A run of `{recipe}` leaves the latents of its batches (float16); every candidate sees them in the same order. "
        "Every {every} steps it is judged on latents of other crops against k-means fitted to those of {probe} crops at "
        "that moment; K = {codes}, placed on the first 8 batches where a candidate asks for that. Regret is the mean over "
        "the second half, `final` that of the last look. Lag: how many steps ago the latents were that the codes fit "
        "best. The encoder does not react: what wins here has to be confirmed in training."
    ),
    profiles=SIZES,
    arms=arms,
    claims=CLAIMS,
    measures=(
        Measure("use", "codes used at the end, %", ".1f", 100),
        Measure("steps_to_95", "steps to 95 % of final use", ".0f"),
        Measure("regret", "regret, dB", ".2f"),
        Measure("final", "final regret, dB", ".2f"),
        Measure("lag", "lag, steps", ".0f"),
        Measure("churn", "tokens changed between looks, %", ".0f", 100),
    ),
    curves=(
        Curve("use", "Codes used", percent=True),
        Curve("regret", "Regret over k-means", "dB"),
    ),
)
