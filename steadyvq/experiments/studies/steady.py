# SPDX-License-Identifier: Apache-2.0
"""The preset `steady` against eight rivals on photographs that nobody's settings were chosen on."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from steadyvq.data.corpus import corpus_files
from steadyvq.experiments.claims import Claim, Decision, Missing, Results, holm, interval, p_value
from steadyvq.experiments.contest import CONTROLS, METHODS, RATES, arm
from steadyvq.experiments.study import ArmPlan, Curve, Measure, Study
from steadyvq.files import write_text
from steadyvq.report.intervals import Dot, intervals_svg

LEVEL = 0.05
BETTER = {"test_psnr": 1.0, "test_lpips": -1.0}
"""The measures that decide, with the sign that makes more better."""
UNITS = {"test_psnr": "PSNR in dB", "test_lpips": "LPIPS"}
SHOWN = {"test_psnr": "{:+.2f} dB", "test_lpips": "{:+.4f} LPIPS"}
LARGE = 4096
NAME = re.compile(r"(?P<method>.+), K=(?P<codes>\d+), (?P<steps>\d+) steps")


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """Everybody at every size and budget; controls at one size."""
    made: dict[str, ArmPlan] = {}
    for codes in settings["codes"]:
        for steps in settings["steps"]:
            controls = CONTROLS if codes == settings["controls_at"] else {}
            for method in ("steady", *METHODS, *controls):
                made[f"{method}, K={codes}, {steps} steps"] = arm(method, codes, steps, RATES[method], judge=True)
    return made


@dataclass(frozen=True)
class Comparison:
    """The preset against one other at one size and budget in one measure.

    Attributes:
        other: Whom it is compared with.
        codes: K.
        steps: The budget.
        measure: Which.
        gain: How much better the preset is, in the measure's unit.
        p: Two-sided, corrected by Holm over the family.
    """

    other: str
    codes: int
    steps: int
    measure: str
    gain: float
    p: float

    @property
    def sure(self) -> bool:
        """Whether the difference is beyond chance."""
        return self.p < LEVEL

    def __str__(self) -> str:
        shown = SHOWN[self.measure].format(self.gain * BETTER[self.measure])
        return f"{shown} at K={self.codes:,}, {self.steps} steps"


def family(results: Results, others: Sequence[str]) -> list[Comparison]:
    """All comparisons of the preset with these others, their p-values corrected together.

    Raises:
        Missing: One of them has no result.
    """
    found = []
    for name in results.arms:
        matched = NAME.fullmatch(name)
        assert matched is not None
        method, codes, steps = matched["method"], int(matched["codes"]), int(matched["steps"])
        if method not in others:
            continue
        for measure, sign in BETTER.items():
            gains = results.gains(f"steady, K={codes}, {steps} steps", name, measure)
            samples = [[sign * gain for gain in own] for own in gains]
            found.append(((method, codes, steps, measure), mean(mean(own) for own in samples), p_value(samples)))
    if {key[0] for key, _, _ in found} != set(others):
        raise Missing("not all of the rivals have results")
    corrected = holm([p for _, _, p in found])
    return [Comparison(*key, gain, p) for (key, gain, _), p in zip(found, corrected, strict=True)]


def _told(own: Sequence[Comparison], total: int) -> str:
    worst = [min((one for one in own if one.measure == measure), key=lambda one: one.gain) for measure in BETTER]
    ahead, behind = (sum(one.sure and (one.gain > 0) == sign for one in own) for sign in (True, False))
    return (
        f"of {len(own)} comparisons ahead in {ahead}, behind in {behind} (Holm over {total}); least favourable: "
        + ", ".join(map(str, worst))
    )


def not_behind(other: str, others: Sequence[str] = tuple(METHODS)) -> Callable[[Results], Decision]:
    """Whether the preset is behind another nowhere, beyond what chance explains."""

    def decide(results: Results) -> Decision:
        everything = family(results, others)
        own = [one for one in everything if one.other == other]
        lost = any(one.sure and one.gain < 0 for one in own)
        seeds = min(len(results.seeds(name)) for name in results.arms)
        return Decision("not reproduced" if lost else "reproduced", _told(own, len(everything)), seeds=seeds)

    return decide


def ahead_somewhere(results: Results) -> Decision:
    """Whether the preset is ahead of SimVQ and of NSVQ in one measure at least, at large K."""
    found = family(results, tuple(METHODS))
    best: dict[str, list[Comparison]] = {}
    for other in ("simvq", "nsvq"):
        own = [one for one in found if one.other == other and one.codes >= LARGE]
        best[other] = [one for one in own if one.sure and one.gain > 0]
    told = "; ".join(f"`{other}`: {', '.join(map(str, won)) or 'nowhere'}" for other, won in best.items())
    seeds = min(len(results.seeds(name)) for name in results.arms)
    return Decision("reproduced" if all(best.values()) else "undecided", told, seeds=seeds)


def need_photographs() -> None:
    """Raises ValueError unless the corpus has been fetched, before 290 runs find out one by one."""
    for held_out in (False, True):
        corpus_files(held_out)


def leads(results: Results) -> dict[str, str]:
    """How far the preset is ahead of everybody else at every size and budget, with intervals that are not corrected: SVGs."""
    made = {}
    for measure, sign in BETTER.items():
        dots = []
        for name in results.arms:
            matched = NAME.fullmatch(name)
            assert matched is not None
            own = f"steady, K={matched['codes']}, {matched['steps']} steps"
            if name == own:
                continue
            try:
                gains = results.gains(own, name, measure)
            except Missing:
                continue
            found = interval([[sign * gain for gain in seed] for seed in gains])
            if math.isfinite(found[1]):
                dots.append(
                    Dot(f"K = {int(matched['codes']):,}", matched["method"], f"{matched['steps']} steps", *found)
                )
        if dots:
            title = f"The preset against the others, {UNITS[measure]}"
            made[measure.removeprefix("test_")] = intervals_svg(title, "the preset is better →", dots)
    return made


def pictures(folder: Path, _: Mapping[tuple[str, int], Path], results: Results) -> Sequence[Path]:
    """The leads as files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {folder / f"lead-{name}.svg": svg for name, svg in leads(results).items()}
    for path, svg in made.items():
        write_text(path, svg)
    return list(made)


TITLES = {
    "vq + replacement": "plain codes on data with replacement",
    "ema + k-means + replacement": "moving averages with k-means start and replacement",
    "simvq": "SimVQ",
    "nsvq": "NSVQ, frozen for the last fifth",
    "nsvq_kernel": "the kernel rule of NS-VQ",
    "fvq": "FVQ",
    "cvq": "CVQ-VAE",
    "rotation": "the rotation trick",
}

STUDY = Study(
    name="steady",
    title="The preset against its rivals",
    question="Is the preset `steady` behind any published method at equal effort, and ahead of SimVQ and NSVQ at large K?",
    protocol=(
        "The corpus of 385 photographs (docs/steady.md): 263 to learn from, judged on two crops of 64x64 of each of 70 test "
        "photographs that the search never saw. The quickstart's autoencoder, steps of 8 crops of 32x32, d = 32, K = {codes}, "
        "budgets of {steps} steps, cosine decay, everybody at the best of three or more rates on `val` (`steady-search`). "
        "Differences are paired by seed and photograph; p-values by Student's t with the larger of the errors over seeds and "
        "over photographs (bootstrap), corrected by Holm over all 96 comparisons. FD-Lite0 and KID-Lite0 "
        "on one crop of each photograph, three seeds and the larger budget; 70 pictures rank, and no more. Regret is over "
        "k-means on 65,536 training latents, three iterations from random ones: a quick rival, and a weak one at K = 16,384. "
        "Controls: two rivals with the preset's start."
    ),
    profiles={
        "tiny": {"codes": [1024, 4096, 16384], "steps": [150, 450], "controls_at": 4096},
        "small": {"codes": [1024, 4096, 16384], "steps": [1000, 4000], "controls_at": 4096},
        "full": {"codes": [4096, 16384, 65536], "steps": [10000, 40000], "controls_at": 16384},
    },
    arms=arms,
    claims=(
        *(Claim(f"The preset is not behind {TITLES[name]}", "ours", not_behind(name)) for name in METHODS),
        Claim("It is ahead of SimVQ and of NSVQ in PSNR or LPIPS at K of 4,096 or more", "ours", ahead_somewhere),
        *(
            Claim(f"It is not behind `{name}`, which has its start", "ours", not_behind(name, tuple(CONTROLS)))
            for name in CONTROLS
        ),
    ),
    measures=(
        Measure("test_psnr", "PSNR, dB", ".2f"),
        Measure("test_lpips", "LPIPS", ".4f"),
        Measure("test_fd", "FD-Lite0", ".0f"),
        Measure("test_kid", "KID-Lite0", ".4f"),
        Measure("test_use", "codes used, %", ".1f", 100),
        Measure("test_perplexity", "perplexity", ".0f"),
        Measure("test_regret", "regret, dB", ".2f"),
    ),
    curves=(Curve("drift", "Encoder drift", "spreads per epoch"),),
    seeds=5,
    draw=pictures,
    check=need_photographs,
)
