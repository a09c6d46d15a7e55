# SPDX-License-Identifier: Apache-2.0
"""What experiments with whole training runs share: three sizes, arms as configuration, claims as differences of arms.

Experiments that build an arm in the same words build the same configuration, and so share its runs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from statistics import mean
from typing import Any

from steadyvq.experiments.claims import Decision, Results, above, below, one_each
from steadyvq.experiments.study import Trained, Values
from steadyvq.training.strict import merge

Settings = Mapping[str, Any]

EPOCH = 20
"""Steps of an epoch of the profile `tiny`, after each of which drift and churn are measured."""

EVALUATIONS = 5
"""Evaluations of a run of the profile `tiny`; each costs as much as ten steps."""

VQ: Values = {"quantizer": {"name": "vq"}}
"""The plain codebook; its start is that of VQGAN, U(-1/K, 1/K)."""
REPLACEMENT: Values = {"quantizer": {"name": "vq", "options": {"maintenance": {"replace": {}}}}}
NS: Values = {"quantizer": {"name": "nsvq", "options": {"maintenance": {"replace": None}}}}
"""The non-stationary loss without replacement."""
NSVQ: Values = {"quantizer": {"name": "nsvq"}}
PLACEBO: Values = {"quantizer": {"name": "steadyvq.experiments.placebo:placebo"}}
SIMVQ: Values = {"quantizer": {"name": "simvq"}}
SIMVQ_NS: Values = {"quantizer": {"name": "simvq", "options": {"losses": {"ns": 0.1}}}}
EMA: Values = {
    "quantizer": {"name": "ema", "init": "kmeans", "options": {"maintenance": {"ema": {"decay": 0.9}, "replace": {}}}}
}
DATA_INIT: Values = {"quantizer": {"init": "data"}}
CONSTANT: Values = {"optim": {"decay": "constant"}}
FROZEN: Values = {"frozen": ["encoder"], "weights": {"ns": 0.0, "commitment": 0.0}, "paused": ["replace"]}
"""What the paper's later stages do."""

RATES = {"simvq": {"optim": {"lr": 8e-3}}}
"""Rates that differ from the quickstart's (codebook 3e-2, all else 2e-3, best for vq, nsvq and ema): docs/evidence.md."""
RATES_TEXT = (
    "Rates are those that were best on the `val` scenes (docs/evidence.md, 1,000 steps); vq's and nsvq's, which are "
    "the same, where an arm was not searched."
)


def freeze(at: float = 0.8) -> Values:
    """The encoder stands still from this fraction of the run on; codes and decoder are consolidated."""
    return {"stages": [{"name": "joint", "until": {"at_fraction": at}}, {"name": "refine", **FROZEN}]}


def profiles(steps: int = 200, full: str = "nsvq_celeba128", **changes: Any) -> dict[str, Values]:
    """The three sizes.

    Args:
        steps: Optimiser steps of the profile `tiny`.
        full: The recipe of the profile `full`.
        changes: Keys for all runs of `tiny` and `small`.
    """
    tiny = {
        "data": {"eval_split": "test", "epoch_samples": 8 * EPOCH, "eval_crops": 128},
        "epochs": steps // EPOCH,
        "eval_every": max(1, steps // EPOCH // EVALUATIONS),
        "checkpoint_every": 100,
    }
    small = {
        "data": {"eval_split": "test", "epoch_samples": 800},
        "quantizer": {"num_codes": 4096},
        "epochs": 40,
        "eval_every": 4,
    }
    paper = {"data": {"epoch_samples": {"nsvq_celeba128": 162_770}.get(full, 1_281_167)}, "stages": [{"name": "joint"}]}
    made = "the quickstart's autoencoder and rates, crops of 32x32 of mvtb-data, 8 per step, judged on `test` scenes"
    return {
        "tiny": {
            "size": f"{steps} steps; {made}, 128 crops (8,192 tokens); K = 1,024, d = 32. {RATES_TEXT}",
            "recipe": "quickstart",
            "run": merge(tiny, changes),
            "tuned": True,
        },
        "small": {
            "size": f"4,000 steps; {made}, 320 crops; K = 4,096, d = 32. {RATES_TEXT}",
            "recipe": "quickstart",
            "run": merge(small, changes),
            "tuned": True,
        },
        "full": {
            "size": f"The recipe `{full}` as the paper has it, on photographs that you give (`--data`).",
            "recipe": full,
            "run": paper,
            "tuned": False,
        },
    }


def trained(settings: Settings, *changes: Values, **others: Any) -> Trained:
    """An arm: the run of a profile with these changes, at the rates of its method.

    Args:
        settings: Of the profile.
        changes: Configuration, later ones over earlier ones.
        others: Further arguments of `Trained`.
    """
    own: Values = reduce(merge, changes, {})
    rates = RATES.get(own.get("quantizer", {}).get("name", ""), {}) if settings["tuned"] else {}
    return Trained(settings["recipe"], merge(merge(settings["run"], rates), own), **others)


def encoder_rate(settings: Settings, factor: float, lr: float | None = None) -> Values:
    """The encoder's learning rate as a multiple of that of the decoder (`lr` None: the recipe's)."""
    if factor == 1:
        return {}
    return {"optim": {"encoder_lr": factor * (lr or (2e-3 if settings["tuned"] else 1e-4))}}


FORMS = {
    "psnr": ("PSNR, dB", ".2f", 1.0),
    "of_ceiling": ("use, points", ".1f", 100.0),
    "relative_error": ("relative error", ".3f", 1.0),
    "perplexity": ("perplexity", ".0f", 1.0),
    "mean_drift": ("drift, spreads per epoch", ".2f", 1.0),
    "mean_churn": ("churn, points", ".1f", 100.0),
    "steps_to_95": ("steps to 95 % of final use", ".0f", 1.0),
}


def ahead(better: str, worse: str, measure: str = "psnr", by: float = 0.0) -> Callable[[Results], Decision]:
    """Decides whether an arm is ahead of another by more than an amount, paired by seed and photograph."""
    label, form, scale = FORMS[measure]
    return lambda r: above(
        r.gains(better, worse, measure), by, f"{label}: `{better}` less `{worse}`", f"+{form}", scale
    )


def at_least(arm: str, measure: str, limit: float) -> Callable[[Results], Decision]:
    """Decides whether a measure of an arm is above a limit."""
    label, form, scale = FORMS[measure]
    return lambda r: above(one_each(r.values(arm, measure)), limit, f"{label} of `{arm}`", form, scale)


def close(arms: Sequence[str], measure: str, within: float) -> Callable[[Results], Decision]:
    """Decides whether arms differ by less than an amount, from the largest to the smallest of each seed."""
    label, form, scale = FORMS[measure]
    what = f"{label}: largest less smallest of {', '.join(f'`{arm}`' for arm in arms)}"
    return lambda r: below(one_each(_ranges(r, arms, measure)), within, what, form, scale)


def _ranges(results: Results, arms: Sequence[str], measure: str) -> list[float]:
    by_arm = [_by_seed(results, arm, arms, measure) for arm in arms]
    return [max(values) - min(values) for values in zip(*by_arm, strict=True)]


def _by_seed(results: Results, arm: str, arms: Sequence[str], measure: str) -> list[float]:
    """Values of an arm for the seeds that all arms have."""
    common = results.seeds(*arms)
    values = dict(zip(results.seeds(arm), results.values(arm, measure), strict=True))
    return [values[seed] for seed in common]


def smallest_gain(
    better: Sequence[str], worse: Sequence[str], measure: str, by: float
) -> Callable[[Results], Decision]:
    """Decides whether the smallest of several gains, pair by pair of arms, is above an amount."""
    label, form, scale = FORMS[measure]
    what = f"{label}: smallest gain of {', '.join(f'`{arm}`' for arm in better)}"

    def decide(results: Results) -> Decision:
        arms = [*better, *worse]
        high, low = ([_by_seed(results, arm, arms, measure) for arm in group] for group in (better, worse))
        gains = [[a - b for a, b in zip(one, two, strict=True)] for one, two in zip(high, low, strict=True)]
        return above(one_each(map(min, zip(*gains, strict=True))), by, what, f"+{form}", scale)

    return decide


def rank_correlation(results: Results, arms: Sequence[str], one: str, other: str) -> list[float]:
    """Spearman's correlation of two measures over arms, for each seed; ties share their mean rank."""
    pairs = [(_by_seed(results, arm, arms, one), _by_seed(results, arm, arms, other)) for arm in arms]
    count = len(results.seeds(*arms))
    return [_spearman([a[s] for a, _ in pairs], [b[s] for _, b in pairs]) for s in range(count)]


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    x, y = _ranks(first), _ranks(second)
    mean_x, mean_y = mean(x), mean(y)
    both = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    squares = sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)
    return both / squares**0.5 if squares > 0 else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    return [mean(i for i, v in enumerate(sorted(values)) if v == value) for value in values]


def last_picture(run: Path) -> Path:
    """The picture of originals and reconstructions that the last evaluation of a run left."""
    return max((run / "pictures").glob("step-*.png"))
