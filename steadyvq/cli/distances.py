# SPDX-License-Identifier: Apache-2.0
"""What `steadyvq eval` does with networks of features, and with another evaluation."""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from steadyvq.cli.common import say, table
from steadyvq.data import EvaluationCrops
from steadyvq.metrics import EvaluationRecord, compare_records, conditions, read_record, refuse_unlike
from steadyvq.metrics.protocol import WEIGHTS, of_record
from steadyvq.models import LPIPS, FeatureNetwork, load_features
from steadyvq.models.features import JUDGES, self_check
from steadyvq.models.perceptual_weights import MissingWeights
from steadyvq.training.distances import small_count

CHECKED = 32
"""Images in a self-check."""


def feature_networks(arguments: argparse.Namespace) -> tuple[list[FeatureNetwork], list[str]]:
    """The networks to measure with, and why the others are not there."""
    named: Path | None = arguments.fd_weights
    if not (arguments.fd or named):
        if arguments.self_check:
            raise ValueError("--self-check looks at networks of features: ask for them with --fd")
        return [], []
    found, without = list[FeatureNetwork](), list[str]()
    for net, judge in JUDGES.items():
        # A file that is named is the Inception's; in a folder each may lie, and the others where they usually do.
        source = named if named is not None and (net == "inception" or _lies_in(named, judge.files)) else None
        try:
            found.append(load_features(net, source))
        except MissingWeights as error:
            if named is not None and not named.exists():
                raise
            without.append(f"without {judge.frechet[0]}: {error}; or name it with --fd-weights")
    if not found:
        raise ValueError(
            "--fd has no network to measure with: " + "; ".join(line.partition(": ")[2] for line in without)
        )
    return found, without


def _lies_in(folder: Path, files: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in files)


def distances(networks: Sequence[FeatureNetwork], metrics: dict[str, Any]) -> dict[str, str]:
    """Columns of the table."""
    shown: dict[str, str] = {}
    for network in networks:
        (frechet, key), (kernel, other) = network.judge.frechet, network.judge.kernel
        shown |= {frechet: f"{metrics[key]:.4g}", kernel: f"{metrics[other]:.3g}"}
    return shown


def notes(networks: Sequence[FeatureNetwork], metrics: dict[str, Any], count: int) -> list[str]:
    """What must be known to read these distances."""
    said = [note for network in networks if (note := small_count(network, metrics, count))]
    for network in networks:
        if not network.judge.verified:
            said.append(
                f"{network.judge.frechet[0]}: our form of {network.judge.title} is not verified with real weights"
            )
    return said


@torch.no_grad()
def show_checks(networks: Sequence[FeatureNetwork], crops: EvaluationCrops) -> None:
    """Prints whether the layers see what they saw in training, and how sure the classes are."""
    images = next(islice(crops.batches(CHECKED), 1))
    rows = []
    for network in networks:
        checks = self_check(network, images)
        sure = network.body.classify(network(images)).softmax(1).amax(1).mean()
        spreads = [check.spread for check in checks]
        rows.append(
            {
                "name": network.judge.title,
                "weights": network.weights_hash[:16],
                "layers": str(len(checks)),
                "largest shift": f"{max(check.shift for check in checks):.2f}",
                "spread": f"{min(spreads):.2f} to {max(spreads):.2f}",
                "first class": f"{float(sure):.0%}",
            }
        )
    table(rows)
    say("self-check: shifts well below 1 and spreads near 1 on large photographs (--crop) mean wired as it was trained")


def alike(path: Path, crops: EvaluationCrops, networks: Sequence[LPIPS | FeatureNetwork]) -> EvaluationRecord:
    """Another evaluation, if it was made on these images by these networks; refused before anything is measured otherwise."""
    if not path.is_file():
        raise ValueError(f"there is no record {path}: name a file that eval or train wrote into evaluations")
    other, facts = read_record(path), crops.record
    hashes: dict[str, str] = {}
    for network in networks:
        names = [f"lpips_{network.net}"] if isinstance(network, LPIPS) else network.judge.names
        hashes |= {f"{name}{WEIGHTS}": network.weights_hash for name in names}
    refuse_unlike(of_record(other), conditions(int(facts["crop"]), int(facts["count"]), str(facts["hash"]), hashes))
    return other


def against(other: EvaluationRecord, record: EvaluationRecord) -> None:
    """Prints the numbers that both have, side by side."""
    rows = [
        {"name": name, "other": f"{old:.6g}", "this": f"{new:.6g}", "difference": f"{new - old:+.4g}"}
        for name, (old, new) in compare_records(other, record).items()
        if not name.endswith(("_low", "_high", "_count"))
    ]
    table(rows)
