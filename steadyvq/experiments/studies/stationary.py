# SPDX-License-Identifier: Apache-2.0
"""Do methods converge to k-means where nothing moves? Frozen latents of a trained encoder, every method beside Lloyd."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from steadyvq.experiments.claims import Claim, Decision, Results, below, one_each
from steadyvq.experiments.latents import SIZES, Dump, as_tensor, source
from steadyvq.experiments.study import Cell, Computed, Curve, Measure, Study, Values
from steadyvq.experiments.tracking import (
    Candidate,
    Follower,
    batches,
    best_codes,
    decibels,
    distortion,
    distortion_of,
    used,
)

LOOKS = 10
RESTARTS = 5


def kmeans(cell: Cell) -> Values:
    """Lloyd's iterations with restarts, and how far a single start is from the best of them."""
    latents = as_tensor(Dump.open(cell.inputs["source"]).probe[-1])
    codes = cell.settings["codes"]
    best = distortion_of(latents, best_codes(latents, codes, cell.seed, iterations=50, restarts=RESTARTS))
    single = distortion_of(latents, best_codes(latents, codes, cell.seed, iterations=50))
    np.save(cell.folder / "best.npy", np.array(best))
    return {"regret": round(decibels(single, best), 4), "use": 1.0}


def converge(cell: Cell) -> Values:
    """A method on shuffled batches of frozen latents, its rate falling to zero, at the best of its rates."""
    s = cell.settings
    latents = as_tensor(Dump.open(cell.inputs["source"]).probe[-1])
    best = float(np.load(cell.inputs["kmeans"] / "best.npy"))
    trials = {}
    for rate in s["rates"]:
        candidate = Candidate(**{**s["candidate"], "rate": rate, "cosine": True})
        follower = Follower(candidate, s["codes"], latents.shape[1], s["steps"], cell.seed)
        follower.begin(latents)
        curve, feed = [], batches(latents, s["batch"], cell.seed)
        for step in range(1, s["steps"] + 1):
            follower.step(next(feed))
            if step % (s["steps"] // LOOKS) == 0:
                made, indices = follower.quantise(latents)
                curve.append([step, round(decibels(distortion(latents, made), best), 3)])
        trials[rate] = (curve[-1][1], curve, used(indices, s["codes"]))
    rate = min(trials, key=lambda one: trials[one][0])
    regret, curve, use = trials[rate]
    return {"regret": regret, "use": round(use, 4), "rate": rate, "curves": {"regret": curve}}


def methods() -> dict[str, dict[str, Any]]:
    """What is tried."""
    alone = {"maintenance": {"replace": None}}
    return {
        "vq": {"quantizer": "vq"},
        "vq on data": {"quantizer": "vq", "init": "data"},
        "vq + replacement": {"quantizer": "vq", "init": "data", "options": {"maintenance": {"replace": {}}}},
        "ema on data": {"quantizer": "ema", "init": "data", "options": {"maintenance": {"ema": {"decay": 0.95}}}},
        "ema + replacement": {
            "quantizer": "ema",
            "init": "data",
            "options": {"maintenance": {"ema": {"decay": 0.95}, "replace": {}}},
        },
        "ns alone": {"quantizer": "nsvq", "options": alone},
        "nsvq": {"quantizer": "nsvq"},
        "nsvq on data": {"quantizer": "nsvq", "init": "data"},
        "nsvq, ns for 50 %": {"quantizer": "nsvq", "ns_until": 0.5},
        "simvq": {"quantizer": "simvq"},
        "simvq + trained base": {"quantizer": "simvq", "options": {"train_base": True}},
        "affine": {"quantizer": "affine"},
        "nsvq_kernel": {"quantizer": "nsvq_kernel"},
        "transvq": {"quantizer": "transvq"},
        "fvq": {"quantizer": "fvq"},
    }


NO_RATE = ("ema on data", "ema + replacement")


def arms(settings: Mapping[str, Any]) -> dict[str, Computed]:
    """The latents, k-means, and every method."""
    own = {name: settings[name] for name in ("codes", "batch", "steps")}
    made = {"source": source(settings["source"])}
    made["kmeans"] = Computed(kmeans, {"codes": settings["codes"]}, needs=["source"])
    for name, candidate in methods().items():
        rates = settings["rates"][:1] if name in NO_RATE else settings["rates"]
        given = {**own, "rates": rates, "candidate": candidate}
        made[name] = Computed(converge, given, needs=["source", "kmeans"], steps=3)
    return made


def near(arm: str, decibel: float) -> Callable[[Results], Decision]:
    """Whether a method ends within so many dB of k-means."""
    return lambda results: below(one_each(results.values(arm, "regret")), decibel, "regret, dB")


def far(arm: str, decibel: float) -> Callable[[Results], Decision]:
    """Whether a method stays further away from k-means than that."""

    def decide(results: Results) -> Decision:
        return below(one_each([-value for value in results.values(arm, "regret")]), -decibel, "minus regret, dB")

    return decide


STUDY = Study(
    name="stationary",
    title="Where nothing moves",
    question="Which methods converge to k-means on frozen latents?",
    protocol=(
        "The latents of training crops at the end of a run are frozen; K = {codes}. Every method sees shuffled batches of "
        "{batch} for {steps} steps, its rate falling to zero along a cosine, at the best of the starting rates {rates}. "
        "Regret is over the best of 5 starts of k-means++ with 50 of Lloyd's iterations on the same latents; `kmeans` is "
        "a single start."
    ),
    profiles={
        "tiny": {"source": SIZES["tiny"], "codes": 256, "batch": 512, "steps": 400, "rates": [0.01, 0.1]},
        "small": {"source": SIZES["small"], "codes": 512, "batch": 1024, "steps": 4000, "rates": [0.001, 0.01, 0.1]},
        "full": {"source": SIZES["full"], "codes": 4096, "batch": 4096, "steps": 20000, "rates": [0.001, 0.01, 0.1]},
    },
    arms=arms,
    claims=(
        Claim("TransVQ converges to k-means (within 0.5 dB)", "arXiv 2602.18896", near("transvq", 0.5), "converges"),
        Claim(
            "NSVQ converges to k-means (within 0.5 dB)", "arXiv 2606.11363", near("nsvq", 0.5), "implied by the freeze"
        ),
        Claim("Moving averages with replacement do (within 0.5 dB)", "ours", near("ema + replacement", 0.5)),
        Claim("SimVQ stalls more than 1 dB away", "ours", far("simvq", 1.0)),
        Claim(
            "The NS loss must end: NSVQ with it for half of the steps is within 0.5 dB",
            "ours",
            near("nsvq, ns for 50 %", 0.5),
        ),
        Claim("Plain VQ from its tiny start stays more than 1 dB away", "ours", far("vq", 1.0)),
    ),
    measures=(Measure("regret", "regret, dB", ".2f"), Measure("use", "codes used, %", ".1f", 100)),
    curves=(Curve("regret", "Regret over k-means", "dB"),),
)
