# SPDX-License-Identifier: Apache-2.0
"""Distances of sets of images in an evaluation: Frechet and kernel distance by the features of every network that is there."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steadyvq.metrics import FeatureDistance
from steadyvq.models.features import FeatureNetwork

PROTOCOL = (
    "; Frechet distance and unbiased kernel distance (of pairs, kernel (x.y / d + 1)^3, 95 % jackknife over photographs) "
    "between originals and reconstructions, on the same 8-bit images"
)
UNVERIFIED = "; {name} by a form of {title} that is not verified with real weights"


class FeatureDistances:
    """Accumulates the features of originals and reconstructions by several networks.

    Args:
        networks: They are moved to the device.
        total: Number of images that will come.
        device: Where the images are.
    """

    def __init__(self, networks: Sequence[FeatureNetwork], total: int, device: torch.device) -> None:
        self._parts = [(network.to(device), FeatureDistance(network.num_features, total)) for network in networks]

    def update(
        self, images: Float[Tensor, "B 3 H W"], reconstructions: Float[Tensor, "B 3 H W"], photographs: Sequence[str]
    ) -> None:
        """Adds a batch of pairs in [-1, 1], with the photograph of each."""
        for network, distance in self._parts:
            distance.update(network(images), network(reconstructions), photographs)

    def metrics(self) -> dict[str, Any]:
        """The distances by name, their counts, and the hash of the weights of each."""
        found: dict[str, Any] = {}
        for network, distance in self._parts:
            report, judge = distance.report(), network.judge
            frechet, kernel = judge.frechet[1], judge.kernel[1]
            found |= {
                frechet: report.frechet,
                f"{frechet}_rank_deficient": report.rank_deficient,
                kernel: report.kernel.value,
                f"{kernel}_low": report.kernel.low,
                f"{kernel}_high": report.kernel.high,
                f"{kernel}_count": report.kernel_count,
                f"{frechet}_weights": network.weights_hash,
                f"{kernel}_weights": network.weights_hash,
            }
        return found

    def protocol(self) -> str:
        """What these distances are, to go on with the sentence of a record."""
        doubts = [
            UNVERIFIED.format(name=network.judge.frechet[0], title=network.judge.title)
            for network, _ in self._parts
            if not network.judge.verified
        ]
        return "".join([PROTOCOL, *doubts]) if self._parts else ""


def small_count(network: FeatureNetwork, metrics: dict[str, Any], count: int) -> str | None:
    """What has to be said where there are too few images for a covariance of full rank, or None."""
    name, key = network.judge.frechet
    if not metrics[f"{key}_rank_deficient"]:
        return None
    return (
        f"{name} is biased upwards: {count} images give covariances of rank {count - 1} at most for "
        f"{network.num_features:,} features; compare it at this number of images alone, or take more with --count"
    )
