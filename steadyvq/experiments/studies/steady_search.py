# SPDX-License-Identifier: Apache-2.0
"""How the preset `steady` and the rates of everybody in its contest were chosen, on the photographs of `val` alone."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from steadyvq.experiments.claims import Claim, Decision, Missing, Results, above
from steadyvq.experiments.contest import METHODS, arm, everybody, steady
from steadyvq.experiments.study import ArmPlan, Study, Trained, Values
from steadyvq.training.strict import merge

RATES = (2e-3, 4e-3, 8e-3)
FURTHER: Mapping[str, Sequence[float]] = {
    "ema + k-means + replacement": (1e-3,),
    "fvq": (1e-3,),
    "simvq": (1.6e-2, 3.2e-2),
}
"""One step further where the best of the three was at an edge, until the best lies inside."""
VARIED = 4e-3
"""The rate at which variants of the preset were compared."""
PATIENCES = (7, 15, 30)


def with_maintenance(**changed: Any) -> Values:
    """The preset's quantizer with other maintenance."""
    codes = steady()["quantizer"]
    own = merge(codes["options"]["maintenance"], changed)
    return {"quantizer": {**codes, "options": {**codes["options"], "maintenance": own}}}


def at_sizes() -> Mapping[str, Values]:
    """What may depend on how many codes and steps there are."""
    found: dict[str, Values] = {
        f"patience of {patience}": with_maintenance(replace={"patience": patience}) for patience in PATIENCES
    }
    found["patience of 30, average of 100 steps"] = with_maintenance(replace={"patience": 30}, ema={"decay": 0.99})
    found["no replacement"] = with_maintenance(replace=None)
    settle, quantise = steady()["stages"]
    resting = {"name": "refine", "paused": ["replace"]}
    found["replacement rests in the last fifth"] = {
        "stages": [settle, {**quantise, "until": {"at_fraction": 0.8}}, resting]
    }
    return found


def variants() -> Mapping[str, Values]:
    """The preset with one thing changed."""
    settle, quantise = steady()["stages"]
    consolidated = {"name": "refine", "frozen": ["encoder"], "weights": {"commitment": 0.0}, "paused": ["replace"]}

    def settled(share: float) -> Values:
        return {"stages": [{**settle, "until": {"at_fraction": share}}, quantise]}

    until = {**quantise, "until": {"at_fraction": 0.8}}
    return {
        "settled for a tenth": settled(0.1),
        "settled for half": settled(0.5),
        "codes on data, not by k-means": {"stages": [settle, {**quantise, "place": "data"}]},
        "patience of 30": with_maintenance(replace={"patience": 30}),
        "no replacement": with_maintenance(replace=None),
        "average of 100 steps": with_maintenance(ema={"decay": 0.99}),
        "rotation trick": {"stages": [settle, {**quantise, "estimator": "rotation"}]},
        "encoder frozen for the last fifth": {"stages": [settle, until, consolidated]},
        "the same, codes by the decoder's gradient": {
            "quantizer": {"name": "vq", "options": {"maintenance": {"replace": {"patience": 7}}}},
            "stages": [settle, until, {**consolidated, "estimator": "direct"}],
        },
    }


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """Everybody at every rate; variants of the preset at one."""
    size = {"codes": settings["codes"], "steps": settings["steps"]}
    made: dict[str, ArmPlan] = {
        f"{name} lr {lr:g}": arm(name, lr=lr, **size)
        for name in everybody()
        for lr in (*settings["rates"], *FURTHER.get(name, ()))
    }
    base = arm("steady", lr=settings["varied"], **size)
    for name, changes in variants().items():
        made[f"steady, {name}"] = Trained(base.recipe, _changed(base.settings, changes))
    for codes, steps in settings["sizes"]:
        base = arm("steady", codes, steps, settings["varied"])
        for name, changes in at_sizes().items():
            made[f"steady, {name}, K={codes}, {steps} steps"] = Trained(base.recipe, _changed(base.settings, changes))
    return made


def _changed(base: Mapping[str, Any], changes: Values) -> Values:
    """A configuration whose quantizer, where it changes, has the new options and nothing of the old ones."""
    own = dict(base)
    if "quantizer" in changes:
        own["quantizer"] = {key: value for key, value in base["quantizer"].items() if key not in ("name", "options")}
    return merge(own, changes)


def best_rate(results: Results, method: str) -> float:
    """The rate of a method with the best PSNR on `val`, mean over seeds.

    Raises:
        Missing: None has a result.
    """
    rates = (*RATES, *FURTHER.get(method, ()))
    tried = {lr: mean(results.values(f"{method} lr {lr:g}", "psnr")) for lr in rates}
    return max(tried, key=lambda lr: tried[lr])


def _ahead(better: str, worse: str) -> Callable[[Results], Decision]:
    """Whether a method is ahead of another in PSNR on `val`, each at its best rate."""

    def decide(results: Results) -> Decision:
        first, second = (f"{name} lr {best_rate(results, name):g}" for name in (better, worse))
        return above(results.gains(first, second, "psnr"), 0.0, f"PSNR, dB: `{first}` less `{second}`", "+.2f")

    return decide


def _any_variant(results: Results) -> Decision:
    """Whether the best variant is ahead of the preset."""
    base = f"steady lr {VARIED:g}"
    names = [f"steady, {name}" for name in variants()]
    found = {name: mean(results.values(name, "psnr")) for name in names if name in results.cells}
    if not found:
        raise Missing("no variant has a result")
    best = max(found, key=lambda name: found[name])
    return above(results.gains(best, base, "psnr"), 0.0, f"PSNR, dB: `{best}` less `{base}`", "+.2f")


STUDY = Study(
    name="steady-search",
    title="How the preset was chosen",
    question="Which start, codes and schedule reconstruct best at equal effort, on photographs that are not the test?",
    protocol=(
        "The corpus of 385 photographs (docs/steady.md), its `train` photographs to learn from and 104 crops of 32x32 of those "
        "of `val` to choose by; the test photographs are not opened. The quickstart's autoencoder, {steps} steps of 8 crops, "
        "K = {codes}, d = 32, cosine decay; everybody at the rates {rates} and, where the best of them was at an edge, beyond; "
        "a free codebook at 3e-2 (`fvq` at 1e-1). "
        "Variants of the preset at {varied}, patience and average at {sizes} (K, steps) too."
    ),
    profiles={
        "tiny": {
            "codes": 4096,
            "steps": 200,
            "rates": list(RATES),
            "varied": VARIED,
            "sizes": [[1024, 450], [16384, 450]],
        },
        "small": {"codes": 4096, "steps": 2000, "rates": list(RATES), "varied": VARIED, "sizes": [[1024, 4000]]},
        "full": {"codes": 16384, "steps": 20000, "rates": list(RATES), "varied": VARIED, "sizes": [[4096, 40000]]},
    },
    arms=arms,
    claims=(
        Claim(
            "Settling first improves moving averages with replacement",
            "ours",
            _ahead("steady", "ema + k-means + replacement"),
        ),
        Claim("... NSVQ", "ours", _ahead("nsvq, late", "nsvq")),
        Claim("... plain codes with replacement", "ours", _ahead("vq + replacement, late", "vq + replacement")),
        Claim("With the same start NSVQ is ahead of the preset", "ours", _ahead("nsvq, late", "steady")),
        *(Claim(f"The preset is ahead of `{name}`", "ours", _ahead("steady", name)) for name in METHODS),
        Claim("A variant of the preset is ahead of it", "ours", _any_variant),
    ),
)
