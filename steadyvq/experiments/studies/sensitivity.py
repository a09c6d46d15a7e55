# SPDX-License-Identifier: Apache-2.0
"""How much do weight and temperature of the non-stationary loss matter? (Fig. 4)"""

from collections.abc import Mapping
from typing import Any

from steadyvq.experiments.claims import Claim
from steadyvq.experiments.closed import NSVQ, REPLACEMENT, ahead, close, profiles, trained
from steadyvq.experiments.study import ArmPlan, Study, Values

WEIGHTS = (0.001, 0.01, 0.05, 0.1, 0.5)
TEMPERATURES = (0.1, 0.3, 0.35, 0.5, 1.0)
SOURCE = "arXiv 2606.11363, Fig. 4 (read off)"


def loss(weight: float, temperature: Any) -> Values:
    """NSVQ with this weight and temperature; what is the default is left out, so that runs are shared."""
    options: Values = {} if weight == 0.1 else {"losses": {"ns": {"weight": weight}}}
    options |= {} if temperature == 0.35 else {"temperature": temperature}
    return {"quantizer": {**NSVQ["quantizer"], "options": options}} if options else NSVQ


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """Weights at the fixed and at a calibrated temperature, temperatures at the paper's weight, no loss."""
    calibrated = {"effective_losers": 16}
    made = {f"weight {w:g}": loss(w, 0.35) for w in WEIGHTS}
    made |= {f"tau {t:g}": loss(0.1, t) for t in TEMPERATURES if t != 0.35}
    made |= {f"weight {w:g}, calibrated": loss(w, calibrated) for w in (0.01, 0.1, 0.5)}
    return {**{name: trained(settings, own) for name, own in made.items()}, "no loss": trained(settings, REPLACEMENT)}


ALL_WEIGHTS = [f"weight {w:g}" for w in WEIGHTS]
FLAT = ["weight 0.1", "tau 0.3", "tau 0.5"]
STUDY = Study(
    name="sensitivity",
    title="Weight and temperature of the non-stationary loss",
    question="Are weight 0.1 and temperature 0.35 special, and does a calibrated temperature make them matter less?",
    protocol=(
        "{size} NSVQ with replacement. Calibrated: tau follows the latents so that about 16 codes share a latent's weight. "
        "The paper judges by rFID on CelebA; here PSNR."
    ),
    profiles=profiles(200),
    arms=arms,
    claims=(
        Claim("Weight 0.1 is better than 0.001", SOURCE, ahead("weight 0.1", "weight 0.001"), "rFID 13.4 and 14.2"),
        Claim("Weight 0.1 is better than 0.5", SOURCE, ahead("weight 0.1", "weight 0.5"), "rFID 13.4 and 15.9"),
        Claim("Temperature 0.35 is better than 0.1", SOURCE, ahead("weight 0.1", "tau 0.1"), "rFID 13.4 and 14.5"),
        Claim("Temperature 0.35 is better than 1", SOURCE, ahead("weight 0.1", "tau 1"), "rFID 13.4 and 14.1"),
        Claim("It is flat from 0.3 to 0.5: 0.3 dB", SOURCE, close(FLAT, "psnr", 0.3), "rFID 13.5, 13.4, 13.5"),
        Claim("Under Adam the weight hardly matters: 0.5 dB", "ours", close(ALL_WEIGHTS, "psnr", 0.5)),
        Claim("Calibrating improves images", "ours", ahead("weight 0.1, calibrated", "weight 0.1")),
    ),
)
