# SPDX-License-Identifier: Apache-2.0
"""How close samples come to photographs, in the features of every network whose weights are there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from steadyvq.data import to_float
from steadyvq.metrics.frechet import FeatureStatistics, frechet_distance, kernel_distance
from steadyvq.metrics.generation import inception_score, precision_recall
from steadyvq.models import FeatureNetwork

PROTOCOL = (
    "samples against crops of photographs, 8-bit images; Frechet distance; unbiased kernel distance of two samples, kernel "
    "(x.y / d + 1)^3; precision and recall with 3 neighbours; Inception score over 10 parts"
)
_BATCH = 64


@dataclass
class Judgement:
    """What was measured.

    Attributes:
        metrics: By their names in records.
        shown: By their names in tables.
        notes: What must be known to read them.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_samples(folder: Path) -> UInt8[Tensor, "N 3 S S"]:
    """The numbered pictures of a folder that `steadyvq sample` wrote.

    Raises:
        ValueError: There are fewer than four, or they differ in size.
    """
    paths = sorted(path for path in folder.glob("*.png") if path.stem.isdecimal())
    if len(paths) < 4:
        raise ValueError(
            f"{folder} holds {len(paths)} samples, but at least 4 are needed: draw some with `steadyvq sample`"
        )
    images = [np.asarray(Image.open(path, formats=("PNG",)).convert("RGB")) for path in paths]
    shapes = {image.shape for image in images}
    if len(shapes) > 1 or images[0].shape[0] != images[0].shape[1]:
        raise ValueError(
            f"the samples in {folder} are not squares of one size: give a folder that one command has written"
        )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def features_of(
    network: FeatureNetwork, images: UInt8[Tensor, "N 3 S S"], tell: Callable[[int], object] = lambda count: None
) -> Float[Tensor, "N d"]:
    """Features of 8-bit images, some at a time."""
    found = []
    for part in torch.split(images, _BATCH):
        found.append(network(to_float(part)))
        tell(len(part))
    return torch.cat(found)


def judge_samples(
    networks: Sequence[FeatureNetwork],
    real: UInt8[Tensor, "N 3 S S"],
    made: UInt8[Tensor, "M 3 S S"],
    tell: Callable[[int], object] = lambda count: None,
) -> Judgement:
    """Frechet distance, kernel distance, precision and recall by every network; with the Inception its score too."""
    result = Judgement()
    for network in networks:
        x, y = features_of(network, real, tell), features_of(network, made, tell)
        statistics = []
        for features in (x, y):
            statistics.append(FeatureStatistics(network.num_features))
            statistics[-1].update(features)
        # The record's names of reconstructions (rfid) are not those of samples.
        is_inception = network.net == "inception"
        names = [("gFID", "gfid"), ("KID", "kid")] if is_inception else [network.judge.frechet, network.judge.kernel]
        values = [frechet_distance(*statistics), kernel_distance(x, y)]
        for suffix, value in zip(("precision", "recall"), precision_recall(x, y), strict=True):
            names.append((f"{suffix} ({network.judge.title})", f"{suffix}_{network.net}"))
            values.append(value)
        if is_inception:
            mean, spread = inception_score(network.body.classify(y))
            names += [("Inception score", "inception_score"), ("its deviation", "inception_score_std")]
            values += [mean, spread]
        for (title, key), value in zip(names, values, strict=True):
            result.shown[title] = result.metrics[key] = value
        for _, key in names[:2]:
            result.metrics[f"{key}_weights"] = network.weights_hash
        if any(part.rank_deficient for part in statistics):
            result.notes.append(
                f"{names[0][0]} is biased upwards: {len(real)} crops and {len(made)} samples for {network.num_features:,} "
                "features; compare it at these numbers alone"
            )
        if not network.judge.verified:
            result.notes.append(f"{names[0][0]}: our form of {network.judge.title} is not verified with real weights")
    return result
