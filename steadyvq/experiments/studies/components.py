# SPDX-License-Identifier: Apache-2.0
"""Which of NSVQ's parts does what? All eight combinations, the same freeze for other methods, a placebo."""

from collections.abc import Mapping
from typing import Any

from steadyvq.experiments.claims import Claim, Decision, Results, above
from steadyvq.experiments.closed import (
    EMA,
    NS,
    NSVQ,
    PLACEBO,
    REPLACEMENT,
    SIMVQ,
    VQ,
    ahead,
    freeze,
    profiles,
    trained,
)
from steadyvq.experiments.study import ArmPlan, Study

METHODS = {"neither": VQ, "replacement": REPLACEMENT, "NS": NS, "NS + replacement": NSVQ, "simvq": SIMVQ, "ema": EMA}
OTHERS = ("neither", "replacement", "simvq", "ema")
PAPER = "arXiv 2606.11363"


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """Every method without and with the freeze; the placebo."""
    free: dict[str, ArmPlan] = {name: trained(settings, method) for name, method in METHODS.items()}
    frozen = {f"{name} + freeze": trained(settings, method, freeze()) for name, method in METHODS.items()}
    return {**free, **frozen, "placebo": trained(settings, PLACEBO)}


def freeze_gain(method: str, source: str, published: str = "") -> Claim:
    """A method is better with the freeze than without."""
    return Claim(
        f"Freezing the encoder for the last fifth improves `{method}`",
        source,
        ahead(f"{method} + freeze", method),
        published,
    )


def own_gain(results: Results) -> Decision:
    """NSVQ's gain by the freeze less the mean gain of the others, by seed."""
    seeds = results.seeds(*(f"{m}{suffix}" for m in METHODS for suffix in ("", " + freeze")))

    def gain(method: str, seed: int) -> float:
        frozen, free = (float(results.cells[arm][seed]["psnr"]) for arm in (f"{method} + freeze", method))
        return frozen - free

    own = [
        [gain("NS + replacement", seed) - sum(gain(other, seed) for other in OTHERS) / len(OTHERS)] for seed in seeds
    ]
    return above(own, 0, "PSNR, dB: gain by the freeze less the others' mean gain", "+.2f")


STUDY = Study(
    name="components",
    title="NS loss, replacement and freeze, one by one and together",
    question="Which of NSVQ's parts keeps codes in use, which improves images, and is the freeze's gain its own?",
    protocol=(
        "{size} The freeze holds the encoder still for the last fifth, without the non-stationary loss, commitment and "
        "replacement; cosine decay of all rates in every arm. The placebo hands the loss's weights to other latents."
    ),
    profiles=profiles(400),
    arms=arms,
    claims=(
        Claim(
            "NS and replacement keep 10 points more in use than neither",
            f"{PAPER}, Fig. 2 (read off)",
            ahead("NS + replacement", "neither", "of_ceiling", 0.1),
            "34 % and 94 to 97 % at x1",
        ),
        Claim("NS alone keeps 10 points more in use", f"{PAPER}, text", ahead("NS", "neither", "of_ceiling", 0.1), ""),
        Claim("It is the right latents that matter: 10 points", "ours", ahead("NS", "placebo", "of_ceiling", 0.1), ""),
        Claim(
            "NS adds use where codes are replaced",
            "ours",
            ahead("NS + replacement", "replacement", "of_ceiling"),
            "",
        ),
        Claim(
            "NS improves images at one rate, with replacement in both",
            f"{PAPER}, Table 1 (SimVQ and SimVQ + NS + schedule)",
            ahead("NS + replacement", "replacement"),
            "24.07 and 24.86 dB",
        ),
        freeze_gain("NS + replacement", f"{PAPER}, text", ""),
        *(freeze_gain(method, "ours") for method in OTHERS),
        Claim("The freeze helps NSVQ more than the others", "ours", own_gain, ""),
    ),
)
