# SPDX-License-Identifier: Apache-2.0
"""Reconstructions side by side, and how sharp they are (Fig. 8)."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steadyvq.experiments.claims import Claim, Results, above
from steadyvq.experiments.closed import EMA, NSVQ, SIMVQ, VQ, freeze, last_picture, profiles, trained
from steadyvq.experiments.outcome import tokenizer_and_crops
from steadyvq.experiments.study import OUTCOME, ArmPlan, Measure, Study, Values

METHODS = {"vq": [VQ], "simvq": [SIMVQ], "ema": [EMA], "nsvq": [NSVQ, freeze()]}
SOURCE = "arXiv 2606.11363, Fig. 8"


def edges(images: Tensor) -> float:
    """Sum of the absolute differences of neighbouring pixels of (B, 3, H, W)."""
    return float(images.diff(dim=2).abs().sum() + images.diff(dim=3).abs().sum())


@torch.no_grad()
def sharpness(run: Path) -> Values:
    """Differences of neighbouring pixels in reconstructions over those in the originals; 1 is as sharp."""
    tokenizer, crops, batch_size = tokenizer_and_crops(run)
    pairs = [(edges(tokenizer(images)[0].clamp(-1, 1)), edges(images)) for images in crops.batches(batch_size)]
    return {"sharpness": round(sum(made for made, _ in pairs) / sum(given for _, given in pairs), 5)}


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """NSVQ and the rivals of the figure."""
    return {name: trained(settings, *own, measure=sharpness) for name, own in METHODS.items()}


def pictures(folder: Path, cells: Mapping[tuple[str, int], Path], _: Results) -> Sequence[Path]:
    """Originals and reconstructions of every arm with seed 0."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [(run, folder / f"{arm}.png") for (arm, seed), run in cells.items() if seed == 0]
    return [Path(shutil.copyfile(last_picture(run), path)) for run, path in made]


def sharper(results: Results, other: str) -> list[list[float]]:
    """NSVQ's sharpness less another's, by seed."""
    return results.gains("nsvq", other, "sharpness")


STUDY = Study(
    name="qualitative",
    title="Reconstructions side by side",
    question="Are NSVQ's boundaries sharper than those of SimVQ and vq?",
    protocol=(
        "{size} NSVQ is frozen for the last fifth. Sharpness: absolute differences of neighbouring pixels, reconstruction over "
        "original. Squared error alone blurs every arm; the paper trains with LPIPS and a discriminator."
    ),
    profiles=profiles(400),
    arms=arms,
    claims=(
        Claim("Sharper than SimVQ", SOURCE, lambda r: above(sharper(r, "simvq"), 0, "sharpness: difference", "+.3f")),
        Claim("Sharper than vq", SOURCE, lambda r: above(sharper(r, "vq"), 0, "sharpness: difference", "+.3f")),
        Claim("Sharper than EMA", "ours", lambda r: above(sharper(r, "ema"), 0, "sharpness: difference", "+.3f")),
    ),
    measures=(*OUTCOME, Measure("sharpness", "sharpness")),
    draw=pictures,
)
