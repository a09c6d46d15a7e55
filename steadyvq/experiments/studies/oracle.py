# SPDX-License-Identifier: Apache-2.0
"""How much is there to gain by tracking better? k-means refitted again and again beside what methods do."""

from collections.abc import Callable, Mapping
from typing import Any

from steadyvq.experiments.claims import Claim, Decision, Results, above, below
from steadyvq.experiments.latents import SIZES, source
from steadyvq.experiments.studies.replay import BEST, candidates, replay
from steadyvq.experiments.study import OUTCOME, OUTCOME_CURVES, Computed, Curve, Measure, Study, Trained

ORACLE = "steadyvq.experiments.oracle:oracle"
EMA = {"ema": {"decay": 0.9}, "replace": {}}


def arms(settings: Mapping[str, Any]) -> dict[str, Computed | Trained]:
    """The oracle at several intervals and a few trackers, replayed and in training."""
    made: dict[str, Computed | Trained] = {"source": source(settings["source"])}
    refit = {"maintenance": {"refit": {"every": 25}}}
    codes = settings["source"]["codes"]
    tried = {f"replayed oracle, every {n}": _oracle(n) for n in settings["every"]}
    others = {"simvq lr 0.01": "simvq", "nsvq lr 0.01": "nsvq", BEST: "ema + replacement"}
    tried |= {f"replayed {name}": candidates()[key] for key, name in others.items()}
    for name, candidate in tried.items():
        made[name] = Computed(replay, {"candidate": candidate, "codes": codes}, needs=["source"], steps=10)
    trained: dict[str, dict[str, Any]] = {
        "oracle": {"quantizer": {"name": ORACLE, "init": "kmeans", "options": refit}},
        "simvq": {"quantizer": {"name": "simvq"}, "optim": {"lr": 8e-3}},
        "nsvq": {"quantizer": {"name": "nsvq"}},
        "ema + replacement": {"quantizer": {"name": "ema", "init": "kmeans", "options": {"maintenance": EMA}}},
    }
    for name, own in trained.items():
        made[f"trained {name}"] = Trained("quickstart", {**own, **settings["training"]})
    return made


def _oracle(every: int) -> dict[str, Any]:
    return {"quantizer": ORACLE, "init": "kmeans", "options": {"maintenance": {"refit": {"every": every}}}}


def _regret(arm: str, margin: float) -> Callable[[Results], Decision]:
    def decide(results: Results) -> Decision:
        return below(results.gains(arm, "replayed oracle, every 25", "regret"), margin, "dB more regret", "+.2f")

    return decide


def _psnr(arm: str) -> Callable[[Results], Decision]:
    return lambda results: above(results.gains("trained oracle", arm, "psnr"), 0.0, "dB of PSNR", "+.2f")


STUDY = Study(
    name="oracle",
    title="The upper bound of tracking",
    question="How far are trackers from k-means refitted to the latents of the last steps?",
    protocol=(
        "Replayed: latents of a run as in `replay`, k-means refitted every {every} steps on the last 16,384 latents. "
        "Trained: the quickstart recipe with the same oracle (every 25 steps) in the place of the quantizer, beside "
        "methods at the rates of the demo, judged on the test scenes; intervals over seeds and photographs."
    ),
    profiles={
        name: {"source": SIZES[name], "every": [5, 25, 100], "training": {**training, "data": {"eval_split": "test"}}}
        for name, training in {
            "tiny": {"epochs": 3, "eval_every": 1},
            "small": {"epochs": 10, "eval_every": 1},
            "full": {"epochs": 100, "eval_every": 5},
        }.items()
    },
    arms=arms,
    claims=(
        Claim("SimVQ tracks within 0.1 dB of the oracle", "ours", _regret("replayed simvq", 0.1)),
        Claim("NSVQ tracks within 0.5 dB of the oracle", "ours", _regret("replayed nsvq", 0.5)),
        Claim(
            "Moving averages with replacement track within 0.1 dB", "ours", _regret("replayed ema + replacement", 0.1)
        ),
        Claim("Training with the oracle gives more PSNR than NSVQ", "ours", _psnr("trained nsvq")),
        Claim("Training with the oracle gives more PSNR than SimVQ", "ours", _psnr("trained simvq")),
        Claim("... than moving averages with replacement", "ours", _psnr("trained ema + replacement")),
    ),
    measures=(
        Measure("use", "codes used at the end, %", ".1f", 100),
        Measure("regret", "regret, dB", ".2f"),
        Measure("lag", "lag, steps", ".0f"),
        *OUTCOME,
    ),
    curves=(Curve("regret", "Regret over k-means, replayed", "dB"), *OUTCOME_CURVES),
)
